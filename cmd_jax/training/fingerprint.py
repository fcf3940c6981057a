"""Fingerprints of arrays: one number each, which any flipped bit changes and no sharding does.

    f(x) = sum_i bits(x_i) * (2 i + 1)  mod 2^32,  i the row-major index in the whole array

Sums of integers commute, so that neither mesh nor number of devices matters. A factor 2 i + 1 is odd and therefore has an
inverse modulo 2^32: a change of a single element of up to 32 bits always changes the sum. Each device sums up its part of an
array; nothing is gathered.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def flatten(tree: Any) -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}; fields of named tuples count as keys."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def fingerprints(tree: Any) -> dict[str, str]:
    """Computes the fingerprint of every array of a tree.

    Args:
        tree: of arrays with elements of at most 32 bits, on the devices of one or several processes.

    Returns:
        Name joined by "/" -> eight hexadecimal digits; in every process the same.

    Raises:
        TypeError: elements of 64 bits.
    """
    return {name: f"{int(value):08x}" for name, value in jax.device_get(_sums(flatten(tree))).items()}


def array_records(tree: Any) -> dict[str, list]:
    """Maps the name of every array to [shape, dtype, fingerprint], as `meta` stores it."""
    sums = fingerprints(tree)
    return {name: [list(leaf.shape), str(leaf.dtype), sums[name]] for name, leaf in flatten(tree).items()}


def array_differences(abstract: Any, stored: dict[str, Any]) -> list[str]:
    """Lists the arrays that differ in shape or dtype between a model and a checkpoint; a phrase each."""
    model = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in flatten(abstract).items()}
    disk = {name: (tuple(shape), dtype) for name, (shape, dtype, _) in stored.items()}

    def shown(name: str, arrays: dict[str, tuple]) -> str:
        if name not in arrays:
            return "nothing"
        same_shape = name in model and name in disk and model[name][0] == disk[name][0]
        return str(arrays[name][1] if same_shape else arrays[name][0])

    return [
        f"{name}: model {shown(name, model)}, checkpoint {shown(name, disk)}"
        for name in sorted(model.keys() | disk.keys())
        if model.get(name) != disk.get(name)
    ]


def digest(meta: dict[str, Any]) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


@jax.jit
def _sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _sum(x) for name, x in arrays.items()}


def _sum(x: jax.Array) -> jax.Array:
    index, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(_bits(x) * (2 * index + 1), dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    """[...] uint32 with the bits of each element."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if x.dtype.itemsize not in _UNSIGNED:
        raise TypeError(f"{x.dtype} has no fingerprint; use elements of at most 32 bits")
    return jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
