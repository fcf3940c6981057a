"""Decoded images of a split, each decoded once: in RAM, in a file on disk where RAM is too small, or not kept; free memory."""

import math
import os
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import NamedTuple

import numpy as np
import psutil

from cmd_jax.config import ConfigDict
from cmd_jax.data.decode import BadImages, decode_record, to_canvas
from cmd_jax.data.sources import Source, fingerprint
from cmd_jax.errors import BadImage, ConfigError

RAM_SHARE = 0.8  # of the free memory
GIB = 2**30
SHARED_MEMORY = "/dev/shm"  # files in memory, on Linux
FORMAT = 2  # of the files: to be raised when decoding or the marks change
HEIGHT, WIDTH, CHECK, BAD = range(4)  # columns of the marks
UNUSED = 2  # references to memory that no other array uses: of the list that keeps it, and of the call that counts


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


class Batch(NamedTuple):
    """Images of one step.

    Attributes:
        canvas: [B, C, C, 3] uint8.
        size: [B, 2] int32, height and width of the image in its canvas.
        index: [B] int32, indices in the dataset. Where an image is bad, canvas and size are those of the next good one, and
            the index stays its own: the two get other augmentations in a batch that holds both.
    """

    canvas: np.ndarray
    size: np.ndarray
    index: np.ndarray


class Plan(NamedTuple):
    """Where decoded images are kept: kind is ram, disk or none; `note` says why, for people."""

    kind: str
    note: str


def plan(source: Source, config: ConfigDict, host: Host = ALONE) -> Plan:
    """Chooses the cache of a split from its size, the free memory and the free disk.

    Processes that share a machine's memory share one cache, so its size is compared with the memory of the machine. All
    processes of a run choose the same.

    Args:
        source: the split.
        config: the config's section `data`.
        host: the processes on this machine.

    Raises:
        ConfigError: the cache that the configuration asks for does not fit.
    """
    side, images = config.canvas_px, len(source)
    needed = images * side * side * 3
    size = f"{images:,} images at {side} px take {needed / GIB:.2f} GiB"
    if config.cache == "none":
        return Plan("none", f"{size}; not kept (data.cache=none), every epoch decodes")
    free = host.least(available_memory() / host.groups)
    have, remedy = f"{free / GIB:.2f} GiB of memory", ""
    if host.shares and (files := host.least(_free(SHARED_MEMORY))) < free:
        free, have = files, f"{files / GIB:.2f} GiB of {SHARED_MEMORY}, where processes share memory,"
        remedy = f"enlarge {SHARED_MEMORY} (docker run --ipc=host; Kubernetes: an emptyDir of medium Memory), "
    fits = needed <= RAM_SHARE * free
    if config.cache == "ram" or (config.cache == "auto" and fits):
        if not fits:
            raise ConfigError(
                f"data.cache is 'ram', but {size} and {have} are free; {remedy}use data.cache=disk, or lower "
                f"data.canvas_px to {int(side * (RAM_SHARE * free / needed) ** 0.5)} or less"
            )
        one = ", one copy for the processes of a machine" if host.shares else ""
        return Plan("ram", f"{size} of {free / GIB:.2f} GiB of free memory{one}")
    directory, made = cache_directory(config), f"{_stem(source, config)}.canvas"
    is_made = os.path.exists(made) and os.path.getsize(made) == needed
    room = host.least(float("inf") if is_made else _free(directory))
    if needed > room:
        raise ConfigError(
            f"data.canvas_px is {side}: {size}, but {have} and {room / GIB:.2f} GiB of disk at "
            f"{directory} are free; lower it, {remedy}set data.cache_dir to a larger disk, or use data.cache=none"
        )
    why = "data.cache=disk" if config.cache == "disk" else f"{have} are free"
    return Plan("disk", f"{size} in {directory} ({why})")


def cache_directory(config: ConfigDict) -> str:
    """The directory of the files of decoded images."""
    return os.path.expanduser(config.cache_dir or os.path.join(config.data_dir, "canvas_cache"))


def _stem(source: Source, config: ConfigDict) -> str:
    """Path of the files of a split without their endings."""
    kind = "gray" if config.grayscale else "rgb"
    name = f"{fingerprint(source)}-{len(source)}x{config.canvas_px}-{kind}-v{FORMAT}"
    return os.path.join(cache_directory(config), name)


def _free(directory: str) -> int:
    """Bytes that are free where a directory is, or will be made."""
    while not os.path.exists(directory):
        directory = os.path.dirname(directory) or "."
    return shutil.disk_usage(directory).free


class CanvasCache:
    """Decodes each image of a source once and gives batches of canvases; safe to use from many threads.

    A file on disk is kept for later runs. Its name is a function of the source's files, the size and the grey levels, so
    changed data gets another one. Several processes of a machine keep their images in one file, of `SHARED_MEMORY` or on
    disk. Each writes what it decodes and reads what the others have written. The file in memory loses its name as soon as all
    of them have opened it, so the kernel frees it when they end, however they end.

    Every image in a file carries a checksum, which is compared when a process first reads it: what a crash of the machine
    left half written, or another process is still writing, is decoded again.

    The place of an image that cannot be decoded is taken by the next one of the dataset, whoever asks and when: what training
    reads is a function of the data alone. A file on disk remembers it. See `decode.BadImages` for when they are too many.

    Attributes:
        note: where the images are kept, for people.
        bad: the bad images found so far, by all processes that share the cache.
    """

    def __init__(self, source: Source, config: ConfigDict, host: Host = ALONE):
        """
        Args:
            source: the split.
            config: the config's section `data`.
            host: the processes on this machine; all processes of a run must make the cache at the same time.

        Raises:
            ConfigError: the cache does not fit, or its files cannot be made.
        """
        self._source, self._side, self._grayscale = source, config.canvas_px, config.grayscale
        chosen = plan(source, config, host)
        self.note = chosen.note
        self._in_file = chosen.kind == "disk" or (chosen.kind == "ram" and host.shares)
        self._lock = threading.Lock()
        self._canvas: np.ndarray | None = None
        shape, marks = (len(source), self._side, self._side, 3), (len(source), 4)
        if self._in_file:
            stem = _stem(source, config) if chosen.kind == "disk" else os.path.join(SHARED_MEMORY, f"cmd_jax-{host.token}")
            files = {f"{stem}.canvas": (shape, np.uint8), f"{stem}.marks": (marks, np.uint32)}
            self._canvas, self._marks = _open_files(files, host, keep=chosen.kind == "disk")
        else:
            # np.zeros takes its pages when they are written: memory grows with what has been decoded.
            self._canvas = np.zeros(shape, np.uint8) if chosen.kind == "ram" else None
            self._marks = np.zeros(marks, np.uint32)
        self._trusted = np.zeros(len(source), bool)  # images that this process has decoded or compared
        self._memory = _MemoryPool()
        self.bad = BadImages(self._marks[:, BAD], "the next one takes its place")

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns one image, decoded if it was not yet: canvas [C, C, 3] uint8 and size [2] int32.

        Raises:
            BadImage: there are too many bad images.
        """
        if self._canvas is not None and (self._trusted[index] or self._compare(index)):
            return self._canvas[index], self._marks[index, :CHECK].astype(np.int32)
        canvas, size = self._decode(index)
        if self._canvas is not None:
            with self._lock:  # the mark says that the canvas is there, so it comes second
                self._canvas[index] = canvas
                self._marks[index, :BAD] = *size, zlib.crc32(canvas) if self._in_file else 0
                self._trusted[index] = True
        return canvas, size

    def _decode(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Decodes an image, or the next one that is not bad."""
        if self._canvas is not None or not self._marks[index, BAD]:
            try:
                return to_canvas(decode_record(self._source[index], grayscale=self._grayscale), self._side)
            except BadImage as error:
                self.bad.note(index, str(error))
        return self.load((index + 1) % len(self._source))

    def _compare(self, index: int) -> bool:
        """Whether another process, now or earlier, has written this image whole to the file."""
        if not self._in_file or not self._marks[index, HEIGHT]:
            return False
        if self._marks[index, BAD]:
            self.bad.note(index, f"{self._name(index)}: was bad when another process decoded it")
        self._trusted[index] = zlib.crc32(self._canvas[index]) == self._marks[index, CHECK]
        return bool(self._trusted[index])

    def _name(self, index: int) -> str:
        try:
            return self._source[index].name
        except BadImage as error:
            return str(error)

    def prepare(self, indices: np.ndarray, pool: Executor) -> list[Future] | None:
        """Starts decoding the missing images of a batch, for `gather`; returns None when all are decoded."""
        if self._canvas is None:
            return [pool.submit(self.load, int(index)) for index in indices]
        missing = indices[~self._trusted[indices]]
        return [pool.submit(self.load, int(index)) for index in np.unique(missing)] if len(missing) else None

    def gather(self, indices: np.ndarray, started: list[Future] | None, pool: Executor, parts: int) -> Batch:
        """Copies a batch into memory that nothing else refers to: new, or of an earlier batch that is no longer used.

        Args:
            indices: [B].
            started: what `prepare` returned for them.
            pool: copies the images.
            parts: in how many parts of the batch, at the same time.

        Raises:
            BadImage: there are too many bad images.
        """
        done = [future.result() for future in started or []]
        if self._canvas is None:
            canvas, size = map(np.stack, zip(*done, strict=True))
            return Batch(canvas, size, indices.astype(np.int32))
        canvas = self._memory.take((len(indices), *self._canvas.shape[1:]))
        # NumPy copies without the GIL; mode "raise" would copy once more.
        copy = lambda rows, out: np.take(self._canvas, rows, axis=0, out=out, mode="clip")
        list(pool.map(copy, np.array_split(indices, parts), np.array_split(canvas, parts)))
        return Batch(canvas, self._marks[indices, :CHECK].astype(np.int32), indices.astype(np.int32))


class _MemoryPool:
    """A pool of batch memory, reused once no array refers to it: clearing new pages takes the kernel as long as the copy.

    An array that JAX still transfers, or that a device of the host uses without a copy, refers to its memory.
    """

    def __init__(self):
        self._kept: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], boundary: int = 64) -> np.ndarray:
        """Returns uninitialised uint8 memory, aligned so that a device that shares the host's memory needs no copy."""
        size = int(np.prod(shape))
        is_free = lambda at: self._kept[at].size == size + boundary and sys.getrefcount(self._kept[at]) <= UNUSED
        with self._lock:
            at = next(filter(is_free, range(len(self._kept))), len(self._kept))
            if at == len(self._kept):
                self._kept.append(np.empty(size + boundary, np.uint8))
            memory = self._kept[at]
            start = -memory.ctypes.data % boundary
            return memory[start : start + size].reshape(shape)


def _open_files(files: dict[str, tuple[tuple[int, ...], type]], host: Host, keep: bool) -> list[np.ndarray]:
    """Maps files as arrays that the processes of a machine share.

    Args:
        files: shape and dtype by path; a file that is missing or of another size is made, full of zeros.
        host: whose first process makes them.
        keep: their disk space is taken at once. Otherwise their names are removed when all processes have opened them, and
            they grow with what is written.

    Raises:
        ConfigError: in all processes; the disk is full.
    """
    problem = None
    try:
        if host.rank == 0:
            for path, (shape, dtype) in files.items():
                _make_file(path, int(np.prod(shape)) * np.dtype(dtype).itemsize, reserve=keep)
    except ConfigError as error:
        problem = error
    if not host.least(problem is None):
        raise problem or ConfigError("another process of this run could not make its cache; its message says why")
    arrays = [np.memmap(path, dtype, "r+", shape=shape).view(np.ndarray) for path, (shape, dtype) in files.items()]
    host.least(1)  # all have opened them
    if host.rank == 0 and not keep:
        for path in files:
            os.remove(path)
    return arrays


def _make_file(path: str, size: int, reserve: bool) -> None:
    """Makes a file of zeros, unless there is one of this size."""
    if os.path.exists(path) and os.path.getsize(path) == size:
        return
    partial = f"{path}.{os.getpid()}.partial"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(partial, "wb") as file:
            if reserve and hasattr(os, "posix_fallocate"):  # a full disk shows here and not as a bus error later
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        os.replace(partial, path)
    except OSError as error:
        if os.path.exists(partial):
            os.remove(partial)
        raise ConfigError(
            f"{path} needs {size / GIB:.2f} GiB ({error.strerror}); free the disk, or set data.cache_dir to another"
        ) from error


class _Controller(NamedTuple):
    """Names of the files of one version of cgroups."""

    folder: str
    limits: tuple[str, ...]
    usage: str
    reclaimable: str  # row of memory.stat: cached file contents that the kernel drops when memory is needed


V1 = _Controller("sys/fs/cgroup/memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
V2 = _Controller("sys/fs/cgroup", ("memory.max", "memory.high"), "memory.current", "inactive_file")


def available_memory(root: str = "/") -> float:
    """Bytes that this process can use: the machine's free memory, or less where a cgroup around the process allows less."""
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
