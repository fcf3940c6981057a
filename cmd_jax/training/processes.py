"""Runs of several processes: how they start, agree and exchange values."""

import hashlib
import json
import os
import secrets
import socket
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost as orbax_multihost

from cmd_jax import files
from cmd_jax.data.cache import ALONE, SHARED_MEMORY, Host
from cmd_jax.errors import ConfigError

TOKEN_BYTES = 16
WAIT_MS = 24 * 3600 * 1000
T = TypeVar("T", bool, float)


def start(coordinator_address: str | None, num_processes: int | None, process_id: int | None, heartbeat_s: int) -> None:
    """Joins this process to the others of its run; called before anything else asks JAX for its devices.

    Args:
        coordinator_address: HOST:PORT of process 0. None, like the next two: taken from Cloud TPU, SLURM or MPI.
        num_processes: of the run.
        process_id: of this one, from 0.
        heartbeat_s: seconds after which the others stop when a process is gone.

    Raises:
        ConfigError: no cluster is found, or the others cannot be reached.
    """
    given = (coordinator_address, num_processes, process_id)
    if any(value is not None for value in given) and any(value is None for value in given):
        raise ConfigError(
            f"--coordinator_address={coordinator_address}, --num_processes={num_processes} and --process_id={process_id} "
            "belong together; pass all three, or none on Cloud TPU and SLURM"
        )
    host = (coordinator_address or "").rpartition(":")[0]
    # Without an address of its own the coordinator listens on all interfaces; on this machine alone, one is enough.
    bind = coordinator_address if host in ("localhost", "127.0.0.1") and process_id == 0 else None
    try:
        jax.distributed.initialize(
            *given, heartbeat_timeout_seconds=heartbeat_s, shutdown_timeout_seconds=heartbeat_s, coordinator_bind_address=bind
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--distributed: {str(error).splitlines()[0]}; on Cloud TPU and SLURM no other flag is needed, elsewhere pass "
            "--coordinator_address=HOST:PORT --num_processes=N --process_id=I"
        ) from error


def is_first() -> bool:
    """Whether this is process 0, which prints and writes for all."""
    return jax.process_index() == 0


def print_once(text: str) -> None:
    """Prints in process 0 alone."""
    if is_first():
        print(text, flush=True)


def broadcast_from_process_0(value: T) -> T:
    """Returns process 0's bool or float (as float32), in all processes; they may see files later than it does."""
    if jax.process_count() == 1:
        return value
    return type(value)(multihost_utils.broadcast_one_to_all(np.float32(value)))


def wait_for_all() -> None:
    """Returns when every process has called it, however long one of them takes.

    JAX's own barriers wait as long as for a lost process at most; here a process that is lost ends the others by its heartbeat.
    """
    orbax_multihost.get_barrier_sync_fn()(key="wait_for_all", timeout_ms=WAIT_MS)


def minimum_of_processes(value: int) -> int:
    """The minimum of an integer below 2^31 over all processes."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).min())


def assert_same_on_all_processes(**values: object) -> None:
    """Raises in all processes unless each has the same values.

    Args:
        values: by the name that the message uses; compared as JSON.

    Raises:
        ConfigError: in every process, naming values and processes that differ from the first one.
    """
    if jax.process_count() == 1:
        return
    digest = lambda value: np.frombuffer(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest(), np.uint32)
    everyone = multihost_utils.process_allgather(np.stack([digest(value) for value in values.values()]))  # [P, values, 8]
    wrong = [
        f"{name} of process {', '.join(map(str, processes))}"
        for index, name in enumerate(values)
        if len(processes := np.nonzero(np.any(everyone[:, index] != everyone[0, index], axis=-1))[0])
    ]
    if wrong:
        mine = ", ".join(f"{name} {_short(value)}" for name, value in values.items())
        raise ConfigError(
            f"{' and '.join(wrong)} differ from process 0; start every process with the same command and data "
            f"(process {jax.process_index()} has {mine})"
        )


def check_shared(workdir: str) -> None:
    """Raises in all processes unless they see the same work directory.

    Raises:
        ConfigError: in every process, naming those that do not see what process 0 writes.
    """
    if jax.process_count() == 1:
        return
    token = _token()
    path = os.path.join(workdir, f".shared-{token}")
    if is_first():
        files.make_directory(workdir)
        files.write(path, token)
    wait_for_all()
    seen = files.exists(path)
    everyone = multihost_utils.process_allgather(np.int32(seen))
    if is_first():
        files.remove(path)
    blind = np.nonzero(everyone == 0)[0]
    if len(blind):
        raise ConfigError(
            f"--workdir={workdir} of process {', '.join(map(str, blind))} is not the directory that process 0 writes to; "
            "use one that all hosts share (NFS, or gs://BUCKET/DIR)"
        )


def this_host() -> Host:
    """Finds the processes of this run on this machine by files in `SHARED_MEMORY`; all processes must call it."""
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return ALONE
    token = _token()
    path = lambda process: os.path.join(SHARED_MEMORY, f"cmd_jax-{token}-{process}")
    try:
        open(path(index), "x").close()
        made = True
    except OSError:
        made = False  # no such directory, or it cannot be written: this process shares with nobody
    wait_for_all()
    group = [process for process in range(count) if os.path.exists(path(process))] if made else [index]
    wait_for_all()
    if made:
        os.remove(path(index))
    machine = int.from_bytes(hashlib.sha256(_machine().encode()).digest()[:4], "little")
    everyone = multihost_utils.process_allgather(np.array([machine, group[0], len(group)], np.uint32))  # [P, 3]
    return Host(
        rank=group.index(index),
        shares=bool(np.any(everyone[:, 2] > 1)),
        groups=len({int(first) for of, first, _ in everyone if of == machine}),
        token=token,
        least=lambda value: float(np.min(multihost_utils.process_allgather(np.float32(value)))),
    )


def _token() -> str:
    """Random hexadecimal digits, the same in all processes."""
    token = multihost_utils.broadcast_one_to_all(np.frombuffer(secrets.token_bytes(TOKEN_BYTES), np.uint8))
    return np.asarray(token, np.uint8).tobytes().hex()


def _machine() -> str:
    """The same in all processes of a machine, in containers too."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read()
    except OSError:
        return socket.gethostname()


def _short(value: object) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 40 else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]}"
