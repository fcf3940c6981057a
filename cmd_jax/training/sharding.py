"""Where arrays live: a mesh of `data` x `model`, and a rule for each array of a run.

Batches are split over `data` and every parameter lies on every device, unless

- `mesh.model` is above 1: prototypes, their moments and the centers are split over `model` along K (method/prototypes.py says
  how the objective runs on them), or
- `mesh.shard_state` is on: every larger array of the state is split over `data` between steps. A step gathers the parameters of
  both networks whole when it starts, and updates moments, parameters and teacher part by part. This is ZeRO's sharding of the
  state and not FSDP (ZeRO-3), which would gather one block at a time; docs/distributed.md says what it saves.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cmd_jax.config import ConfigDict
from cmd_jax.errors import ConfigError
from cmd_jax.hardware import Hardware
from cmd_jax.method.chunks import DATA, MODEL
from cmd_jax.models.build import Params
from cmd_jax.training import processes
from cmd_jax.training.state import TrainState

MIN_SPLIT_SIZE = 1024  # elements; gathering less costs more time than its memory is worth


class Shardings(NamedTuple):
    """A mesh and the rules by which arrays lie on it."""

    mesh: Mesh
    shard_state: bool

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(DATA))

    def of_state(self, state: TrainState | Params) -> Any:
        """One sharding for every leaf of a state, or of a part of it, that is stored between steps."""
        return jax.tree_util.tree_map_with_path(lambda path, leaf: self._place(path, leaf, self.shard_state), state)

    def in_use(self, params: Params) -> Any:
        """One sharding for every parameter while a network runs: only prototypes stay split."""
        return jax.tree_util.tree_map_with_path(lambda path, leaf: self._place(path, leaf, False), params)

    def _place(self, path: tuple, leaf: Any, split: bool) -> NamedSharding:
        axes: list[str | None] = [None] * leaf.ndim
        names = [str(getattr(part, "key", getattr(part, "name", part))) for part in path]
        if leaf.ndim and any("last_layer" in name or name == "centers" for name in names) and "last_layer_count" not in names:
            axes[0] = MODEL
        if split and leaf.ndim >= 2 and leaf.size >= MIN_SPLIT_SIZE:
            free = [axis for axis, name in enumerate(axes) if name is None and leaf.shape[axis] % self.mesh.shape[DATA] == 0]
            if free:
                axes[max(free, key=lambda axis: leaf.shape[axis])] = DATA
        return NamedSharding(self.mesh, PartitionSpec(*axes))


def make_shardings(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Shardings:
    """The mesh of a configuration over the devices of all processes.

    Args:
        config: resolved or not.
        devices: None: those that there are. Those of a topology that is elsewhere can be compiled for.

    Raises:
        ConfigError: devices, batch or prototypes do not divide.
    """
    devices = jax.devices() if devices is None else devices
    data, model = mesh_shape(config, len(devices))
    for count in Counter(device.process_index for device in devices).values():
        if count % model:
            raise ConfigError(
                f"mesh.model is {model}, but a process has {count} devices; use a divisor of that, so that "
                "the prototypes of one batch row stay within a process"
            )
    mesh = jax.make_mesh((data, model), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2, devices=devices)
    return Shardings(mesh, config.mesh.shard_state)


def mesh_shape(config: ConfigDict, devices: int) -> tuple[int, int]:
    """(data, model) of a configuration on a number of devices.

    Raises:
        ConfigError: devices, batch or prototypes do not divide.
    """
    model, batch_size, accumulate = config.mesh.model, config.train.batch_size, config.train.accumulate
    data = devices // model if config.mesh.data == -1 else config.mesh.data
    if data * model != devices:
        raise ConfigError(
            f"a mesh of mesh.data={config.mesh.data} x mesh.model={model} does not fit {devices} devices; "
            "use --config.mesh.data=-1 and a --config.mesh.model that divides them"
        )
    if batch_size is not None and batch_size % (data * accumulate):
        unit = data * accumulate
        fit = max(1, batch_size // unit) * unit
        parts = f"{data} devices" + (f" x {accumulate} of train.accumulate" if accumulate > 1 else "")
        raise ConfigError(f"train.batch_size {batch_size} does not divide over {parts}; use {fit} or {fit + unit}")
    prototypes = config.head.prototypes or 0
    if prototypes % model:
        raise ConfigError(f"head.prototypes is {prototypes}, which mesh.model={model} does not divide; use a multiple of it")
    return data, model


def all_hardware() -> Hardware:
    """The devices of all processes; of their memory the smallest, so that all processes resolve the same values."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()]
    memory_mib = processes.minimum_of_processes(min(limits) // 2**20)
    device = jax.devices()[0]
    cuda = "cuda" in device.client.platform_version  # ROCm's platform is "gpu" too
    return Hardware(device.platform, jax.device_count(), memory_mib * 2**20 or None, cuda)


def data_parallel(devices: list[jax.Device]) -> Shardings:
    """Plain data parallelism over some devices: of this process, or of all processes."""
    return Shardings(jax.make_mesh((len(devices), 1), (DATA, MODEL), (AxisType.Auto,) * 2, devices=devices), shard_state=False)


def local_copy(params: Params, shardings: Shardings) -> Params:
    """Parameters, however they are split over processes, whole on every device of this one: for evaluation.

    Nothing is copied where they are whole already, so a step that is given `params` to write in place ends the result too.
    """
    whole = jax.device_put(params, shardings.replicated)
    of_process = data_parallel(jax.local_devices()).replicated
    return jax.tree.map(lambda leaf: jax.device_put(leaf.addressable_data(0), of_process), whole)
