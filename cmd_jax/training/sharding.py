"""Where arrays live: one mesh axis `data` over all devices; batches split over it, the state on every device."""

from typing import NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cmd_jax.config import ConfigError, Hardware


class Shardings(NamedTuple):
    """A mesh and the two ways the project lays arrays on it."""

    mesh: Mesh
    replicated: NamedSharding
    batch: NamedSharding


def make_shardings(batch_size: int) -> Shardings:
    """Data parallelism over all local devices.

    Raises:
        ConfigError: the batch does not divide over the devices.
    """
    devices = jax.local_device_count()
    if batch_size % devices:
        fit = max(1, batch_size // devices) * devices
        raise ConfigError(f"train.batch_size {batch_size} does not divide over {devices} devices; use {fit} or {fit + devices}")
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    return Shardings(mesh, NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data")))


def local_hardware() -> Hardware:
    """The devices of this process."""
    device = jax.local_devices()[0]
    memory = device.memory_stats() or {}
    return Hardware(device.platform, jax.local_device_count(), memory.get("bytes_limit"))
