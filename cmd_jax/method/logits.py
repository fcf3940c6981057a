"""Logits over K prototypes, of the student and of the teacher."""

import jax

from cmd_jax.method.products import product

Array = jax.Array


def student_logits(z: Array, prototypes: Array, temp: float, dtype: str = "float32") -> Array:
    """W z / temp: [..., d] -> [..., K] float32 logits; dtype: of the product, see `products.product`."""
    return product("...d,kd->...k", z, prototypes, dtype) / temp


def teacher_logits(z: Array, prototypes: Array, center: Array, temp: Array | float, dtype: str = "float32") -> Array:
    """(W z - center) / temp: [..., d] -> [..., K] float32 logits; dtype: of the product."""
    return (product("...d,kd->...k", z, prototypes, dtype) - center) / temp
