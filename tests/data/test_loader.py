"""The order is a function of (seed, epoch); every image is decoded once."""

import io

import numpy as np
import pytest
from PIL import Image

from cmd_jax.config import ConfigError
from cmd_jax.data.loader import CanvasCache, batches, epoch_order
from cmd_jax.data.sources import NO_BOXES, Record


class Numbered:
    """Images whose every pixel is their index; counts how often each is read."""

    class_names = ()

    def __init__(self, count):
        self.reads = np.zeros(count, int)

    def __len__(self):
        return len(self.reads)

    def __getitem__(self, index):
        self.reads[index] += 1
        out = io.BytesIO()
        Image.new("L", (4, 3), int(index)).save(out, "png")
        return Record(out.getvalue(), -1, str(index), NO_BOXES)


def test_order_is_a_new_permutation_every_epoch_and_depends_on_the_seed():
    order = epoch_order(10, seed=1)
    epochs = np.array([order[position] for position in range(30)]).reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [epoch_order(10, seed=1)[position] for position in range(10)] == list(epochs[0])
    assert [epoch_order(10, seed=2)[position] for position in range(10)] != list(epochs[0])


def test_batches_hold_their_images_continue_anywhere_and_decode_once():
    source = Numbered(10)
    cache = CanvasCache(source, 6)
    stream = batches(cache, 10, 4, seed=0, first_step=0, threads=3)
    first = [next(stream) for _ in range(8)]
    for batch in first:
        assert batch.canvas.shape == (4, 6, 6, 3)
        np.testing.assert_array_equal(batch.canvas[:, 2, 3, 0], batch.index)
        np.testing.assert_array_equal(batch.size, np.tile([3, 4], (4, 1)))
    later = next(batches(cache, 10, 4, seed=0, first_step=5, threads=1))
    np.testing.assert_array_equal(later.index, first[5].index)
    np.testing.assert_array_equal(source.reads, np.ones(10))


def test_a_cache_larger_than_the_memory_is_refused_with_a_size_that_fits():
    with pytest.raises(ConfigError, match=r"data.canvas_px=4096 needs .* lower it to \d+"):
        CanvasCache(Numbered(2_000_000), 4096)
