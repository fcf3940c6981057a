"""Precision of the matrix products of the objective: one rule for all of them.

Accelerators round the operands of a float32 product unless they are told not to (TPUs to bfloat16, NVIDIA GPUs to TF32). That
is enough to swap near ties in a matching and to move a center, so float32 here means float32 on every backend. Products with
prototypes are nearly all of the objective's arithmetic; they alone take bfloat16 operands where `model.dtype` says so.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def operand(x: Array, dtype: str = "float32") -> Array:
    """x as an operand of `product`: rounded to bfloat16, or float32 (float64 stays)."""
    return x.astype(jnp.bfloat16 if dtype == "bfloat16" else jnp.promote_types(x.dtype, jnp.float32))


def product(spec: str, a: Array, b: Array, dtype: str = "float32") -> Array:
    """einsum of two operands, accumulated in float32.

    Args:
        spec: of `jnp.einsum`.
        a: first operand.
        b: second operand.
        dtype: "float32" computes with `precision="highest"`; "bfloat16" rounds both operands first.

    Returns:
        float32; float64 if an operand is.
    """
    accumulated = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    precision = None if dtype == "bfloat16" else "highest"
    return jnp.einsum(spec, operand(a, dtype), operand(b, dtype), precision=precision, preferred_element_type=accumulated)
