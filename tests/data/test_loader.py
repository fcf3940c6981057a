"""The order is a function of (seed, epoch); every process reads its own rows; what is prefetched is what is read."""

import io
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from cmd_jax.config import default
from cmd_jax.data.loader import CanvasCache, Prefetch, batches, epoch_order
from cmd_jax.data.sources import NO_BOXES, Record
from cmd_jax.errors import BadImage, ConfigError


class Numbered:
    """Images whose every pixel is their index; counts how often each is read."""

    class_names = ()

    def __init__(self, count, files=()):
        self.reads = np.zeros(count, int)
        self.files = list(files)

    def __len__(self):
        return len(self.reads)

    def __getitem__(self, index):
        self.reads[index] += 1
        out = io.BytesIO()
        Image.new("L", (4, 3), int(index)).save(out, "png")
        return Record(out.getvalue(), -1, str(index), NO_BOXES)


def section(**values):
    data = default().data
    data.canvas_px = 6
    data.update(values)
    return data


def take(stream, count):
    found = [next(stream) for _ in range(count)]
    stream.close()
    return found


def test_order_depends_on_seed_and_epoch():
    order = epoch_order(10, seed=1)
    epochs = np.array([order[position] for position in range(30)]).reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [epoch_order(10, seed=1)[position] for position in range(10)] == list(epochs[0])
    assert [epoch_order(10, seed=2)[position] for position in range(10)] != list(epochs[0])


@pytest.mark.parametrize("kind", ["ram", "disk", "none"])
def test_batches_start_at_any_step(kind, tmp_path):
    source = Numbered(10)
    cache = CanvasCache(source, section(cache=kind, cache_dir=str(tmp_path)))
    first = take(batches(cache, 10, 4, seed=0, first_step=0, threads=3), 8)
    for batch in first:
        assert batch.canvas.shape == (4, 6, 6, 3)
        assert batch.canvas.dtype == np.uint8
        assert (batch.size.dtype, batch.index.dtype) == (np.int32, np.int32)
        np.testing.assert_array_equal(batch.canvas[:, 2, 3, 0], batch.index)
        np.testing.assert_array_equal(batch.size, np.tile([3, 4], (4, 1)))
    (later,) = take(batches(cache, 10, 4, seed=0, first_step=5, threads=1), 1)
    np.testing.assert_array_equal(later.index, first[5].index)
    if kind == "none":
        assert source.reads.sum() >= 36
    else:
        np.testing.assert_array_equal(source.reads, np.ones(10))


def test_batch_memory_is_reused_once_free():
    cache = CanvasCache(Numbered(8), section(cache="ram", canvas_px=8))
    stream = batches(cache, 8, 4, seed=0, first_step=0, threads=2)
    start_of = lambda batch: batch.canvas.ctypes.data
    first = next(stream)
    part, shown, starts = first.canvas[1:3], first.canvas[1:3].copy(), [start_of(first)]
    del first
    second = next(stream)
    starts.append(start_of(second))
    on_device = jax.device_put(second.canvas)  # on a CPU this is the memory itself
    del second
    starts.append(start_of(next(stream)))
    assert len(set(starts)) == 3
    np.testing.assert_array_equal(part, shown)
    np.testing.assert_array_equal(np.asarray(on_device)[:, 0, 0, 0], [epoch_order(8, 0)[position] for position in range(4, 8)])
    del part
    later = [next(stream) for _ in range(3)]
    assert [start_of(batch) for batch in later[:2]] == [starts[0], starts[2]]
    assert start_of(later[2]) not in starts
    stream.close()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_each_process_reads_its_own_rows(processes):
    order = epoch_order(20, seed=3)
    for process in range(processes):
        source = Numbered(20)
        cache = CanvasCache(source, section(cache="ram"))
        parts = take(batches(cache, 20, 8, 3, 0, 2, process, processes), 2)
        rows = 8 // processes
        expected = [[order[step * 8 + process * rows + row] for row in range(rows)] for step in range(2)]
        np.testing.assert_array_equal([part.index for part in parts], expected)
        # it looks two batches ahead, in its own rows
        own = {order[step * 8 + process * rows + row] for step in range(4) for row in range(rows)}
        assert set(np.flatnonzero(source.reads)) <= own


def test_batch_size_must_divide_over_processes():
    with pytest.raises(ConfigError, match=r"train\.batch_size 10 does not divide over 4 processes; use 8 or 12"):
        batches(CanvasCache(Numbered(20), section()), 20, 10, 0, 0, 1, 0, 4)


def test_prefetch_keeps_the_order():
    threads, made = set(), []

    def items():
        for number in range(6):
            made.append(number)
            yield number

    def place(number):
        threads.add(threading.current_thread())
        return 10 * number

    stream = Prefetch(items(), place, depth=2)
    assert list(stream) == [0, 10, 20, 30, 40, 50]
    assert threads.isdisjoint({threading.current_thread()})
    stream.close()


def test_prefetch_closes_and_passes_errors_on():
    closed = threading.Event()

    def endless():
        try:
            yield from iter(int, 1)
        finally:
            closed.set()

    stream = Prefetch(endless(), lambda item: item, depth=1)
    assert next(stream) == 0
    stream.close()
    assert closed.is_set()
    assert list(stream) == []

    def failing():
        yield 1
        raise BadImage("a.jpg: bad")

    stream = Prefetch(failing(), lambda item: item, depth=3)
    assert next(stream) == 1
    with pytest.raises(BadImage, match=r"a\.jpg: bad"):
        next(stream)
    assert list(stream) == []
    stream.close()
