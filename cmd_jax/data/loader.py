"""Batches of uint8 canvases in an order that is a function of (seed, epoch), ready on the device before they are needed."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TypeVar

import grain
import numpy as np

from cmd_jax.data.cache import Batch, CanvasCache
from cmd_jax.errors import ConfigError

LOOK_AHEAD = 2  # batches that are decoded beside the one that is asked for
T = TypeVar("T")


def epoch_order(images: int, seed: int) -> grain.MapDataset:
    """The order of the images, without end: position p holds an index of the dataset, every epoch its own permutation."""
    return grain.MapDataset.range(images).seed(seed).shuffle().repeat(None)


def process_slice(batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of the global batch that a process reads; contiguous, so their order does not depend on the process count.

    Raises:
        ConfigError: the batch does not divide over the processes.
    """
    if batch_size % process_count:
        fit = max(1, batch_size // process_count) * process_count
        raise ConfigError(
            f"train.batch_size {batch_size} does not divide over {process_count} processes; use {fit} or {fit + process_count}"
        )
    rows = batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)


def batches(
    cache: CanvasCache,
    images: int,
    batch_size: int,
    seed: int,
    first_step: int,
    threads: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yields batches from a step on, without end; step s holds positions s * B .. s * B + B - 1 of the order.

    Args:
        cache: of the training images.
        images: number of training images.
        batch_size: B, of all processes together.
        seed: of the order.
        first_step: the step of the first batch.
        threads: that decode; as many copy decoded images into batches.
        process_index: of this process; it decodes nothing but its own rows.
        process_count: how many share the batch; each gets B / process_count rows.

    Raises:
        ConfigError: the batch does not divide over the processes.
    """
    share = process_slice(batch_size, process_index, process_count)
    return _batches(cache, epoch_order(images, seed), batch_size, first_step, threads, share)


def _batches(
    cache: CanvasCache, order: grain.MapDataset, batch_size: int, first_step: int, threads: int, share: slice
) -> Iterator[Batch]:
    ahead: deque = deque()
    with ThreadPoolExecutor(threads, "decode") as pool, ThreadPoolExecutor(threads, "gather") as gatherers:
        try:
            for step in count(first_step):
                start = step * batch_size
                indices = np.array([order[position] for position in range(start + share.start, start + share.stop)], np.int64)
                ahead.append((indices, cache.prepare(indices, pool)))
                if len(ahead) > LOOK_AHEAD:
                    yield cache.gather(*ahead.popleft(), gatherers, threads)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class Prefetch(Iterator[T]):
    """Prefetches batches to the device in a thread, while the last step runs.

    Exceptions of the iterator are raised at their turn. `close` stops the thread.

    Attributes:
        waited_s: seconds that `next` has waited, all calls together; it stops growing when the thread keeps ahead.
    """

    def __init__(self, items: Iterator, place: Callable, depth: int):
        """
        Args:
            items: what is iterated over.
            place: applied to every item in the thread, for example the transfer to the device.
            depth: how many placed items may wait.
        """
        self._queue: queue.Queue = queue.Queue(depth)
        self._stopped = threading.Event()
        self.waited_s = 0.0
        self._thread = threading.Thread(target=self._run, args=(items, place), name="prefetch", daemon=True)
        self._thread.start()

    def _run(self, items: Iterator, place: Callable) -> None:
        try:
            for item in items:
                self._put((place(item), None))
                if self._stopped.is_set():
                    break
            else:
                self._put((None, StopIteration()))
        except BaseException as error:  # whatever it is, it must end the loop that waits
            self._put((None, error))
        finally:
            if hasattr(items, "close"):
                items.close()

    def _put(self, item: tuple) -> None:
        while not self._stopped.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
        return None

    def __next__(self) -> T:
        if self._stopped.is_set():  # closed, or the error that ended it came out before
            raise StopIteration
        started = time.perf_counter()
        item, error = self._queue.get()
        self.waited_s += time.perf_counter() - started
        if error is not None:
            self._stopped.set()
            raise error
        return item

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
