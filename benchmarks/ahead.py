"""The train step compiled for a TPU slice that is not here, by the compiler inside of libtpu; nothing runs."""

import ast
import contextlib
import os
import re
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax

from cmd_jax import config as config_lib
from cmd_jax.config import ConfigDict, Hardware
from cmd_jax.training.run import Run, build_run

IMAGES = 100_000  # of the imagined data set: schedules alone depend on it
GIB = 2**30


class NoTopology(Exception):
    """libtpu is missing, or has no such slice."""


class Chip(NamedTuple):
    """What its maker states of a chip (docs.cloud.google.com/tpu/docs/v5e and /v6e).

    Attributes:
        hbm_bytes: of memory; the compiler leaves a little less to a program.
        flops_per_s: of products in bfloat16.
        hbm_bytes_per_s: read and written.
        link_bytes_per_s: of one of the four links to neighbours, in one direction.
    """

    hbm_bytes: int
    flops_per_s: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float


# "Bidirectional ICI bandwidth (per chip)" is 400 and 800 GB/s: four links, two directions.
CHIPS = {"v5e": Chip(16 * GIB, 197e12, 819e9, 50e9), "v6e": Chip(32 * GIB, 918e12, 1640e9, 100e9)}


class Memory(NamedTuple):
    """Bytes on one device: arguments (state and batch; results take their place), temporary arrays, the program."""

    arguments: int
    temporary: int
    program: int

    @property
    def total(self) -> int:
        return sum(self)


def topology_devices(name: str) -> Sequence[jax.Device]:
    """The devices of a slice such as "v5e:2x4", for `build_run`; nothing can be put on them.

    Raises:
        NoTopology: libtpu is missing, or has no such slice.
    """
    # Without these libtpu asks a metadata server which machine it is on, writes logs to /tmp, and refuses a second process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies  # it loads the compiler

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # of many kinds
        raise NoTopology(f"no topology {name}: {str(error).splitlines()[0]} (make tpu-compile installs libtpu)") from error


def configuration(settings: Sequence[str]) -> ConfigDict:
    """The defaults with `section.key=value` each, as `--config.section.key=value` sets them."""
    config = config_lib.default().lock()
    for item in settings:
        key, _, value = item.partition("=")
        section, name = key.split(".")
        with contextlib.suppress(ValueError, SyntaxError):  # a word stays one
            value = ast.literal_eval(value)
        config[section][name] = value
    return config


def build(settings: Sequence[str], devices: Sequence[jax.Device]) -> Run:
    """The run of a configuration as it is on a TPU, for devices that are or are not there.

    Raises:
        ConfigError: a value cannot work.
    """
    images = range(IMAGES)  # in place of a source: its length alone counts
    return build_run(configuration(settings), images, Hardware("tpu", len(devices)), devices)


def memory_of(compiled: jax.stages.Compiled) -> Memory:
    """Of a program whose state is donated."""
    stats = compiled.memory_analysis()
    kept = stats.output_size_in_bytes - stats.alias_size_in_bytes  # results that take no argument's place
    return Memory(stats.argument_size_in_bytes, stats.temp_size_in_bytes + kept, stats.generated_code_size_in_bytes)


class Attempt(NamedTuple):
    """A compilation: the program, or how much memory it would need.

    Attributes:
        compiled: None where it does not fit.
        needed_bytes: on a device, of what fits and of what does not.
        seconds: of the compiler.
    """

    compiled: jax.stages.Compiled | None
    needed_bytes: int
    seconds: float


def attempt(run: Run) -> Attempt:
    """Compiles the step; what does not fit the memory is no error.

    Raises:
        jax.errors.JaxRuntimeError: the compiler fails for another reason.
    """
    started = time.perf_counter()
    try:
        compiled = run.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_memory(str(error))
        if needed is None:
            raise
        return Attempt(None, needed, time.perf_counter() - started)
    return Attempt(compiled, memory_of(compiled).total, time.perf_counter() - started)


def needed_memory(message: str) -> int | None:
    """Bytes on a device from the compiler's refusal; None where it speaks of something else."""
    match = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    return int(float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[match[2]]) if match else None
