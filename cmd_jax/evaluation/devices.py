"""Programs of an evaluation on the devices of all processes: rows are split over them, and every process gets the result."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cmd_jax.method.chunks import DATA
from cmd_jax.training.sharding import Shardings, data_parallel

QUERIES_PER_DEVICE = 256  # at a time: similarities to 25,000 images take 26 MB


@functools.cache
def everywhere() -> Shardings:
    """Data parallelism over the devices of all processes."""
    return data_parallel(jax.devices())


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process holds -> a global one, without communication."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def padded(array: np.ndarray, rows: int) -> np.ndarray:
    """[N, ...] -> [rows, ...], zeros behind."""
    return np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1))


def by_query(function: Callable) -> Callable:
    """Compiles (gallery arrays, query arrays [B, ...]) -> tree of [B, ...]; every device computes its share of the queries."""

    @functools.cache
    def compiled() -> Callable:
        split = jax.shard_map(
            function,
            mesh=everywhere().mesh,
            in_specs=(PartitionSpec(), PartitionSpec(DATA)),
            out_specs=PartitionSpec(DATA),
            check_vma=False,
        )
        return jax.jit(split, out_shardings=everywhere().replicated)

    return lambda *arguments: compiled()(*arguments)


def in_chunks(program: Callable, gallery: tuple, queries: tuple, poll: Callable[[], None] = lambda: None) -> Any:
    """Applies a program of `by_query` to any number of queries.

    All chunks have the same shape, so that a number does not depend on how many devices or processes there are.

    Args:
        program: compiled by `by_query`.
        gallery: arrays that every device reads whole.
        queries: arrays [Q, ...] with Q of at least 1.
        poll: called before every chunk, `chunks` times.

    Returns:
        The program's results as numpy arrays [Q, ...], the same in every process.
    """
    shardings, rows, found = everywhere(), QUERIES_PER_DEVICE * jax.device_count(), []
    whole = tuple(place(array, shardings.replicated) for array in gallery)
    for start in range(0, len(queries[0]), rows):
        poll()
        part = [array[start : start + rows] for array in queries]
        result = program(whole, tuple(place(padded(array, rows), shardings.batch) for array in part))
        found.append(jax.tree.map(np.asarray, result))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(queries[0])], *found)


def chunks(queries: int) -> int:
    """How many chunks `in_chunks` makes of the queries."""
    return -(-queries // (QUERIES_PER_DEVICE * jax.device_count()))
