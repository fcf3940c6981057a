"""Unit vectors, and their logits over K prototypes, of the student and of the teacher."""

import jax
import jax.numpy as jnp

from cmd_jax.method.products import product

Array = jax.Array


def l2_normalize(x: Array, eps: float = 1e-12) -> Array:
    """x / max(|x|, eps) over the last axis, float32; the gradient at 0 is finite."""
    x = x.astype(jnp.float32)
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, eps * eps))


def student_logits(z: Array, prototypes: Array, temp: float, dtype: str = "float32") -> Array:
    """W z / temp: [..., d] -> [..., K] float32 logits; dtype: of the product, see `products.product`."""
    return product("...d,kd->...k", z, prototypes, dtype) / temp


def teacher_logits(z: Array, prototypes: Array, center: Array, temp: Array | float, dtype: str = "float32") -> Array:
    """(W z - center) / temp: [..., d] -> [..., K] float32 logits; dtype: of the product."""
    return (product("...d,kd->...k", z, prototypes, dtype) - center) / temp
