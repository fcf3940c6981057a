"""Logits over K prototypes of rows that are few: the released term and the parity checks want them as they are."""

import jax
import jax.numpy as jnp
from jax import lax

from cmd_jax.method.chunks import Normalizer, for_chunks, take_chunk
from cmd_jax.method.products import product

Array = jax.Array


def student_logits(z: Array, prototypes: Array, temp: float, dtype: str = "float32") -> Array:
    """W z / temp: [..., d] -> [..., K] float32; dtype: of the product, see `products.product`."""
    return product("...d,kd->...k", z, prototypes, dtype) / temp


def teacher_logits(z: Array, prototypes: Array, center: Array, temp: Array | float, dtype: str = "float32") -> Array:
    """(W z - center) / temp: [..., d] -> [..., K] float32; dtype: of the product."""
    return (product("...d,kd->...k", z, prototypes, dtype) - center) / temp


def bag_probs(z: Array, prototypes: Array, center: Array, temp: Array | float, chunk: int, dtype: str = "float32") -> Array:
    """sum_i softmax_k((W z_i - center) / temp): [B, Q, M, d] -> [B, Q, K] float32, rows sum to M; no gradient."""
    count = prototypes.shape[0]

    def logits(start: Array | int, size: int) -> Array:
        return teacher_logits(z, take_chunk(prototypes, start, size), take_chunk(center, start, size), temp, dtype)

    states = for_chunks(
        count, chunk, lambda s, start, size: s.add(logits(start, size)), Normalizer.start(z.shape[:-1], jnp.float32)
    )
    normalizer = states.finish()[..., None]

    def add(bags: Array, start: Array | int, size: int) -> Array:
        part = jnp.sum(jnp.exp(logits(start, size) - normalizer), axis=2)
        return lax.dynamic_update_slice_in_dim(bags, part, start, axis=-1)

    return for_chunks(count, chunk, add, jnp.zeros((*z.shape[:2], count), jnp.float32))
