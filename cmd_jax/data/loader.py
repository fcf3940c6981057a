"""Batches of uint8 canvases in an order that is a function of (seed, epoch), decoded once and kept in RAM."""

import threading
from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np
import psutil

from cmd_jax.config import ConfigError
from cmd_jax.data.decode import decode_record, to_canvas
from cmd_jax.data.sources import Source


class Batch(NamedTuple):
    """What one step needs of the data.

    Attributes:
        canvas: [B, C, C, 3] uint8.
        size: [B, 2] int32, height and width of the picture in its canvas.
        index: [B] int32, indices in the dataset.
    """

    canvas: np.ndarray
    size: np.ndarray
    index: np.ndarray


class CanvasCache:
    """Decodes each image of a source once and keeps its canvas in one uint8 array."""

    def __init__(self, source: Source, canvas_px: int, grayscale: bool = False):
        needed, free = len(source) * canvas_px * canvas_px * 3, psutil.virtual_memory().available
        if needed > 0.8 * free:
            raise ConfigError(
                f"data.canvas_px={canvas_px} needs {needed / 2**30:.1f} GiB for {len(source)} images, "
                f"but {free / 2**30:.1f} GiB of memory are free; "
                f"lower it to {int(canvas_px * (0.8 * free / needed) ** 0.5)} or less"
            )
        self._source, self._canvas_px, self._grayscale = source, canvas_px, grayscale
        # np.zeros takes its pages when they are written: memory grows with what has been decoded.
        self._canvas = np.zeros((len(source), canvas_px, canvas_px, 3), np.uint8)
        self._size = np.zeros((len(source), 2), np.int32)
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> Batch:
        """One image as a batch element without the leading axis."""
        if not self._size[index, 0]:
            record = self._source[index]
            canvas, size = to_canvas(decode_record(record, grayscale=self._grayscale), self._canvas_px)
            with self._lock:  # the size is the mark that the canvas is there, so it comes second
                self._canvas[index] = canvas
                self._size[index] = size
        return Batch(self._canvas[index], self._size[index], np.int32(index))


def epoch_order(images: int, seed: int) -> grain.MapDataset:
    """Endless random-access order: position p holds an index of the dataset, every epoch its own permutation."""
    return grain.MapDataset.range(images).seed(seed).shuffle().repeat(None)


def batches(cache: CanvasCache, images: int, batch_size: int, seed: int, first_step: int, threads: int) -> Iterator[Batch]:
    """Endless batches from a step on; step s holds positions s * B .. s * B + B - 1 of the order.

    Args:
        cache: of the training images.
        images: number of training images.
        batch_size: B.
        seed: of the order.
        first_step: the step of the first batch.
        threads: decoding threads.
    """
    elements = epoch_order(images, seed).map(cache.__getitem__)[first_step * batch_size :]
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * batch_size)
    return iter(
        elements.to_iter_dataset(read).batch(batch_size, batch_fn=lambda rows: Batch(*map(np.stack, zip(*rows, strict=True))))
    )
