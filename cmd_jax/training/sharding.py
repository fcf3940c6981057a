"""Shardings: a mesh of one axis, `data`, and a rule for each array of a run.

Batches are split over `data`, and every parameter lies on every device. With `mesh.shard_state` every larger array of the state
is split over `data` between steps: a step gathers the parameters of both networks whole when it starts, and updates moments,
parameters and teacher part by part. This is ZeRO's sharding of the state and not FSDP (ZeRO-3), which would gather one block at
a time; docs/distributed.md says what it saves.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cmd_jax.config import ConfigDict, Hardware
from cmd_jax.errors import ConfigError
from cmd_jax.method.chunks import DATA
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
        return jax.tree.map(self._place if self.shard_state else lambda leaf: self.replicated, state)

    def in_use(self, params: Params) -> Any:
        """One sharding for every parameter while a network runs: whole on every device."""
        return jax.tree.map(lambda leaf: self.replicated, params)

    def _place(self, leaf: Any) -> NamedSharding:
        """Splits a larger array along its longest axis that divides over the devices."""
        axes: list[str | None] = [None] * leaf.ndim
        if leaf.ndim >= 2 and leaf.size >= MIN_SPLIT_SIZE:
            fitting = [axis for axis in range(leaf.ndim) if leaf.shape[axis] % self.mesh.shape[DATA] == 0]
            if fitting:
                axes[max(fitting, key=lambda axis: leaf.shape[axis])] = DATA
        return NamedSharding(self.mesh, PartitionSpec(*axes))


def make_shardings(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Shardings:
    """The mesh of a configuration over the devices of all processes.

    Args:
        config: resolved or not.
        devices: None: those that there are. Those of a topology that is elsewhere can be compiled for.

    Raises:
        ConfigError: devices or batch do not divide.
    """
    devices = jax.devices() if devices is None else devices
    check_mesh(config, len(devices))
    return Shardings(make_mesh(devices), config.mesh.shard_state)


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """All devices along the axis DATA."""
    return jax.make_mesh((len(devices),), (DATA,), axis_types=(AxisType.Auto,), devices=devices)


def check_mesh(config: ConfigDict, devices: int) -> None:
    """Checks that a configuration fits a number of devices.

    Raises:
        ConfigError: devices or batch do not divide.
    """
    batch_size, accumulate = config.train.batch_size, config.train.accumulate
    if config.mesh.data not in (-1, devices):
        raise ConfigError(f"mesh.data is {config.mesh.data}, but there are {devices} devices; use -1, which takes all")
    if batch_size is not None and batch_size % (devices * accumulate):
        unit = devices * accumulate
        fit = max(1, batch_size // unit) * unit
        parts = f"{devices} devices" + (f" x {accumulate} of train.accumulate" if accumulate > 1 else "")
        raise ConfigError(f"train.batch_size {batch_size} does not divide over {parts}; use {fit} or {fit + unit}")


def all_hardware() -> Hardware:
    """The devices of all processes; of their memory the smallest, so that all processes resolve the same values."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()]
    memory_mib = processes.minimum_of_processes(min(limits) // 2**20)
    device = jax.devices()[0]
    cuda = "cuda" in device.client.platform_version  # ROCm's platform is "gpu" too
    return Hardware(device.platform, jax.device_count(), memory_mib * 2**20 or None, cuda)


def data_parallel(devices: list[jax.Device]) -> Shardings:
    """Plain data parallelism over some devices: of this process, or of all processes."""
    return Shardings(make_mesh(devices), shard_state=False)


def local_copy(params: Params, shardings: Shardings) -> Params:
    """Parameters, however they are split over processes, whole on every device of this one: for evaluation.

    Nothing is copied where they are whole already, so a step that is given `params` to write in place ends the result too.
    """
    whole = jax.device_put(params, shardings.replicated)
    of_process = data_parallel(jax.local_devices()).replicated
    return jax.tree.map(lambda leaf: jax.device_put(leaf.addressable_data(0), of_process), whole)
