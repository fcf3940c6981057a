"""Prepares a run: resolves the configuration and builds network, optimizer, shardings and the compiled step."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from cmd_jax import config as config_lib
from cmd_jax.config import ConfigDict, Hardware, validate
from cmd_jax.data.loader import Batch
from cmd_jax.data.sources import Source
from cmd_jax.errors import ConfigError
from cmd_jax.method.types import Centers
from cmd_jax.models.build import Params, make_network
from cmd_jax.models.network import Network
from cmd_jax.training.memory import return_free_memory
from cmd_jax.training.optimizer import adamw, make_groups
from cmd_jax.training.resume import has_steps, with_stored_values
from cmd_jax.training.schedules import make_schedules, steps_per_epoch, total_steps
from cmd_jax.training.sharding import Shardings, all_hardware, make_shardings
from cmd_jax.training.state import TrainState, init_state
from cmd_jax.training.step import make_train_step

# For the step on GPUs, so that a run continues bit for bit. XLA then excludes operations that add up in no fixed order, the
# backward pass of cuDNN's attention among them, and does not time kernels to choose one, which can end differently in each
# compilation. Untuned Triton kernels are slow, so products are left to cuBLAS.
GPU_COMPILER_OPTIONS = {"xla_gpu_deterministic_ops": True, "xla_gpu_enable_triton_gemm": False}


class Run(NamedTuple):
    """What a configuration and its data define before the first step."""

    config: ConfigDict  # resolved
    source: Source
    network: Network
    optimizer: optax.GradientTransformationExtraArgs
    shardings: Shardings
    train_step: jax.stages.Wrapped
    steps: int
    shapes: TrainState  # of the state; to trace its initialisation takes a tenth of a start

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state; nothing is computed."""
        place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.tree.map(place, self.shapes, self.shardings.of_state(self.shapes))

    def place(self, batch: Batch) -> Batch:
        """A batch on the devices: this process's rows of it (`loader.process_slice`) become a part of the whole."""
        count = self.config.train.batch_size
        put = lambda x: jax.make_array_from_process_local_data(self.shardings.batch, x, (count, *x.shape[1:]))
        return jax.tree.map(put, batch)

    def lower(self) -> jax.stages.Lowered:
        """The step for batches of the run's shape alone."""
        side, count = self.config.data.canvas_px, self.config.train.batch_size
        shapes = (((count, side, side, 3), "uint8"), ((count, 2), "int32"), ((count,), "int32"))
        batch = Batch(*(jax.ShapeDtypeStruct(*shape, sharding=self.shardings.batch) for shape in shapes))
        return self.train_step.lower(self.abstract_state(), batch)

    def compile(self) -> jax.stages.Compiled:
        """The step as one program, which is never compiled again."""
        compiled = self.lower().compile()
        return_free_memory()
        return compiled

    def first_state(self) -> TrainState:
        """The state before the first step, from the seed."""
        placed = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        init = lambda: init_state(self.config, self.network, self.optimizer, len(self.source))
        return jax.jit(init, out_shardings=placed).lower().compile()()


def prepare_run(
    config: ConfigDict,
    open_source: Callable[[ConfigDict, str], Source],
    workdir: str | None = None,
    follow_weights: Callable[[ConfigDict], ConfigDict] = lambda config: config,
) -> Run:
    """Checks and resolves a configuration and opens its data.

    Args:
        config: as given, not resolved.
        open_source: opens a split ("train") of a section `data`.
        workdir: of the run; one that has begun keeps its own values where the configuration leaves them open.
        follow_weights: fills what the configuration of a new run leaves open from the files beside `init.weights`.

    Raises:
        ConfigError: a value cannot work.
    """
    validate(config)
    config = with_stored_values(config, workdir) if workdir and has_steps(workdir) else follow_weights(config)
    make_shardings(config)  # a mesh that does not fit is found before the data is opened
    return build_run(config, open_source(config.data, "train"), all_hardware())


def build_run(config: ConfigDict, source: Source, hardware: Hardware, devices: Sequence[jax.Device] | None = None) -> Run:
    """Resolves a configuration and builds its step.

    Args:
        config: as given.
        source: of the training images; only their number counts here.
        hardware: that the run is for.
        devices: as in `make_shardings`; for devices that are elsewhere the step can be compiled, and nothing else.

    Raises:
        ConfigError: a value cannot work.
    """
    config = config_lib.resolve(config, len(source), hardware)
    validate(config)
    config_lib.check_attention(config, hardware)
    shardings = make_shardings(config, devices)
    batch_size = config.train.batch_size
    if batch_size > len(source):
        remedy = "use at most that" if hardware.devices <= len(source) else "use fewer devices, or more images"
        raise ConfigError(f"train.batch_size is {batch_size}, but there are {len(source)} training images; {remedy}")
    network = make_network(config)
    optimizer = adamw(config.optim.clip_grad, make_groups(config, steps_per_epoch(config, len(source))))
    shapes = jax.eval_shape(lambda: init_state(config, network, optimizer, len(source)))
    of_state = shardings.of_state(shapes)
    train_step = jax.jit(
        make_train_step(config, network, optimizer, make_schedules(config, len(source)), shardings),
        in_shardings=(of_state, shardings.batch),
        out_shardings=(of_state, shardings.replicated),
        donate_argnums=0,
        compiler_options=GPU_COMPILER_OPTIONS if hardware.platform == "gpu" else None,
    )
    return Run(config, source, network, optimizer, shardings, train_step, total_steps(config, len(source)), shapes)


def with_weights(state: TrainState, arrays: Mapping[str, np.ndarray]) -> TrainState:
    """A first state with these arrays in student and teacher, and in the centers; what they do not name stays.

    Args:
        state: before the first step.
        arrays: name joined by "/" -> array of the parameter's shape; "centers/image" and "centers/region" -> [K].
    """
    centers = replace_arrays({"centers": state.centers._asdict()}, arrays)["centers"]
    student, teacher = (replace_arrays(params, arrays) for params in (state.student, state.teacher))
    return state._replace(student=student, teacher=teacher, centers=Centers(**centers))


def replace_arrays(params: Params, arrays: Mapping[str, np.ndarray]) -> Params:
    """Parameters with some of them replaced, by name, on the devices of those that they replace."""
    # Copies: on a CPU the device may keep the array itself, and student and teacher must not be the same memory.
    put = lambda name, leaf: jax.device_put(np.array(arrays[name]), leaf.sharding) if name in arrays else leaf
    return unflatten_dict({name: put(name, leaf) for name, leaf in flatten_dict(params, sep="/").items()}, sep="/")
