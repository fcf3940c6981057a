"""The machine that a process runs on: how much memory it may still take, and which other processes share it."""

import math
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import psutil

SHARED_MEMORY = "/dev/shm"  # files in memory, on Linux


class Host(NamedTuple):
    """The processes of a run that share one machine's memory; the default is a run of one process.

    Attributes:
        rank: of this process among those that see the same `SHARED_MEMORY`; the one of rank 0 creates their files.
        shares: whether several processes see the same `SHARED_MEMORY`, on this or on another machine of the run.
        groups: groups of processes on this machine that use its memory but do not see each other's `SHARED_MEMORY`
            (containers).
        token: part of the names of their files, the same in all processes of a run and different in every other run.
        least: the smallest of a number over all processes of the run. It waits for all of them, so all must call it.
    """

    rank: int = 0
    shares: bool = False
    groups: int = 1
    token: str = ""
    least: Callable[[float], float] = float


ALONE = Host()


class _Controller(NamedTuple):
    """Where one version of cgroups keeps its numbers."""

    folder: str
    limits: tuple[str, ...]
    usage: str
    reclaimable: str  # row of memory.stat: cached file contents that the kernel drops when memory is needed


V1 = _Controller("sys/fs/cgroup/memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
V2 = _Controller("sys/fs/cgroup", ("memory.max", "memory.high"), "memory.current", "inactive_file")


def available_memory(root: str = "/") -> float:
    """Bytes that this process can take: what the machine has free and what every cgroup around the process still allows."""
    return min(psutil.virtual_memory().available, cgroup_memory(root))


def cgroup_memory(root: str = "/") -> float:
    """Bytes that the cgroups of this process (versions 1 and 2) still allow; infinity where none has a limit.

    A limit anywhere between the process's own cgroup and the root counts. Inside a container the path in /proc/self/cgroup
    may be the one on the host, while the container's own cgroup is mounted at the root: directories that are missing are
    skipped on the way up.

    Args:
        root: of the file system, for tests.
    """
    return min((_room(directory, controller) for directory, controller in _cgroups(root)), default=math.inf)


def _cgroups(root: str) -> Iterator[tuple[str, _Controller]]:
    for line in _read(os.path.join(root, "proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        controller = V1 if controllers else V2
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield os.path.join(root, controller.folder, *parts[:depth]), controller


def _room(directory: str, controller: _Controller) -> float:
    limits = [_read(os.path.join(directory, name)).strip() for name in controller.limits]
    limit = min((int(limit) for limit in limits if limit.isdecimal()), default=math.inf)
    used = _read(os.path.join(directory, controller.usage)).strip()
    if limit == math.inf or not used.isdecimal():
        return math.inf
    statistics = dict(line.split() for line in _read(os.path.join(directory, "memory.stat")).splitlines())
    return max(0, limit - int(used) + int(statistics.get(controller.reclaimable, 0)))


def _read(path: str) -> str:
    """A file's text, empty where there is none."""
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
