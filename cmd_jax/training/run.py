"""What a configuration and its data define before the first step: network, optimizer, shardings, the compiled step."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import optax

from cmd_jax import config as config_lib
from cmd_jax.config import ConfigDict
from cmd_jax.data.cache import plan
from cmd_jax.data.loader import Batch
from cmd_jax.data.sources import Source, eval_section, open_source, where
from cmd_jax.errors import ConfigError
from cmd_jax.hardware import Hardware
from cmd_jax.models.build import count_parameters, make_network
from cmd_jax.models.network import Network
from cmd_jax.training.flops import model_flops
from cmd_jax.training.memory import return_free_memory
from cmd_jax.training.optimizer import adamw
from cmd_jax.training.processes import this_host
from cmd_jax.training.resume import has_steps, with_stored_values
from cmd_jax.training.schedules import make_schedules, steps_per_epoch, total_steps
from cmd_jax.training.sharding import Shardings, all_hardware, make_shardings
from cmd_jax.training.state import TrainState, init_state
from cmd_jax.training.step import make_train_step
from cmd_jax.validation import validate
from cmd_jax.weights.transfer import follow_source, initial_weights, start_from

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

    def compile(self) -> jax.stages.Compiled:
        """The step as one program; it takes batches of the run's shape alone, so it is never compiled again."""
        side, count = self.config.data.canvas_px, self.config.train.batch_size
        shapes = (((count, side, side, 3), "uint8"), ((count, 2), "int32"), ((count,), "int32"))
        batch = Batch(*(jax.ShapeDtypeStruct(*shape, sharding=self.shardings.batch) for shape in shapes))
        compiled = self.train_step.lower(self.abstract_state(), batch).compile()
        return_free_memory()
        return compiled

    def first_state(self) -> TrainState:
        """The state before the first step; says what it takes from `init.weights`."""
        placed = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        init = jax.jit(lambda: init_state(self.config, self.network, self.optimizer), out_shardings=placed).lower().compile()
        if not self.config.init.weights:
            return init()
        weights = initial_weights(self.config, self.network)
        print("\n".join(f"init: {note}" for note in weights.notes), flush=True)
        return start_from(init(), weights.arrays)


def prepare_run(config: ConfigDict, workdir: str | None = None) -> Run:
    """Checks and resolves a configuration and opens its data.

    Args:
        config: as given, not resolved.
        workdir: of the run; one that has begun keeps its own values where the configuration leaves them open.

    Raises:
        ConfigError: a value cannot work.
        WeightsError: the files beside `init.weights` cannot be read.
    """
    validate(config)
    config = with_stored_values(config, workdir) if workdir and has_steps(workdir) else follow_source(config)
    make_shardings(config)
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
    optimizer = adamw(
        config.optim.clip_grad, round(config.optim.freeze_last_layer_epochs * steps_per_epoch(config, len(source)))
    )
    shapes = jax.eval_shape(lambda: init_state(config, network, optimizer))
    of_state = shardings.of_state(shapes)
    train_step = jax.jit(
        make_train_step(config, network, optimizer, make_schedules(config, len(source)), shardings),
        in_shardings=(of_state, shardings.batch),
        out_shardings=(of_state, shardings.replicated),
        donate_argnums=0,
        compiler_options=GPU_COMPILER_OPTIONS if hardware.platform == "gpu" else None,
    )
    return Run(config, source, network, optimizer, shardings, train_step, total_steps(config, len(source)), shapes)


def describe(config: ConfigDict, workdir: str | None = None) -> str:
    """What `--dry_run` prints: data, model, shapes, memory and arithmetic of the compiled step; nothing is trained.

    Args:
        config: as given, not resolved.
        workdir: of the run that would be continued, if any.

    Raises:
        ConfigError: a value cannot work.
    """
    run = prepare_run(config, workdir)
    config, state = run.config, run.abstract_state()
    init = [f"init        {note}" for note in initial_weights(config, run.network).notes] if config.init.weights else []
    count, memory = config.train.batch_size, run.compile().memory_analysis()
    evaluated = eval_section(config.data)
    test = open_source(evaluated, "test")
    notes = [f"data        {split}: {of.note}" for split, of in (("train", run.source), ("test", test)) if of.note]
    views, token_px = config.views, config_lib.token_px(config)
    patches = lambda side: (-(-side // token_px)) ** 2
    model = f"{config.model.name}/{config.model.patch_size}"
    backbone, total = count_parameters(state.student["backbone"]), count_parameters(state.student)
    gib, devices, precision = 2**30, run.shardings.mesh.devices, config.model.dtype  # devices: [data, model]
    if config.model.teacher_dtype != config.model.dtype:
        precision += f", the teacher in {config.model.teacher_dtype}"
    lines = [
        f"data        {where(config.data)}: {len(run.source):,} train, {len(test):,} test images"
        f"{'' if where(evaluated) == where(config.data) else f' of {where(evaluated)}'}, {len(test.class_names)} classes",
        *notes,
        f"cache       {plan(run.source, config.data, this_host()).note}",
        f"views       2 x {views.global_px} px ({patches(views.global_px)} patches), "
        f"{views.local_count} x {views.local_px} px ({patches(views.local_px)} patches)",
        f"model       {model}: {backbone:,} parameters in the backbone, {total:,} with heads and "
        f"{config.head.prototypes:,} prototypes a level; computed in {precision}",
        *init,
        f"run         {run.steps:,} steps of {count:,} images, {count // devices.shape[0]} on each of {devices.size} device(s) "
        f"({devices.flat[0].device_kind}), {config.train.epochs:g} epochs",
        f"memory      {memory.argument_size_in_bytes / gib:.2f} GiB of state and batch, "
        f"{memory.temp_size_in_bytes / gib:.2f} GiB temporary on each device",
        f"speed       attention {config.model.attention}, "
        + ", ".join(f"{key} {config.model[key]}" for key in ("packed_views", "scan_blocks", "remat"))
        + f", {config.method.prototype_chunk:,} prototypes at a time, {config.method.matched_targets} targets",
        f"arithmetic  {model_flops(config) / 1e9:.2f} GFLOP an image and step, each product counted once",
    ]
    return "\n".join(lines)
