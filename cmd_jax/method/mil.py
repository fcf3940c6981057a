"""Attention-based multi-instance learning (Ilse, Tomczak, Welling, arXiv 1802.04712): patches are the instances of a bag."""

import jax
import jax.numpy as jnp

Array = jax.Array


def gated_attention_scores(tokens: Array, tanh_kernel: Array, sigmoid_kernel: Array, out_kernel: Array) -> Array:
    """Scores e_i = w . (tanh(V h_i) * sigmoid(U h_i)) of every patch.

    Args:
        tokens: [..., N, D] patch embeddings h.
        tanh_kernel: [D, M], V.
        sigmoid_kernel: [D, M], U.
        out_kernel: [M], w.

    Returns:
        [..., N] float32 scores (logits of the MIL weights).
    """
    gated = jnp.tanh(tokens @ tanh_kernel) * jax.nn.sigmoid(tokens @ sigmoid_kernel)
    return (gated @ out_kernel).astype(jnp.float32)


def attention_scores(tokens: Array, tanh_kernel: Array, out_kernel: Array) -> Array:
    """Scores e_i = w . tanh(V h_i) of every patch, without the gate.

    Args:
        tokens: [..., N, D] patch embeddings h.
        tanh_kernel: [D, M], V.
        out_kernel: [M], w.

    Returns:
        [..., N] float32 scores (logits of the MIL weights).
    """
    return (jnp.tanh(tokens @ tanh_kernel) @ out_kernel).astype(jnp.float32)


def mil_weights(scores: Array, temp: float) -> Array:
    """a = softmax_i(e_i / temp): [..., N] scores -> [..., N] float32 weights that sum to 1."""
    return jax.nn.softmax(scores.astype(jnp.float32) / temp, axis=-1)


def relative_entropy(weights: Array) -> Array:
    """-sum_i a_i log a_i / log N: 1 is uniform, 0 a single patch; the gradient at a weight of 0 is finite.

    Args:
        weights: [..., N] MIL weights, sum to 1; N is 2 or more.

    Returns:
        [...] float32.
    """
    weights = weights.astype(jnp.float32)
    logs = jnp.log(jnp.maximum(weights, jnp.finfo(jnp.float32).tiny))
    return -jnp.sum(weights * logs, axis=-1) / jnp.log(weights.shape[-1])


def bag_embedding(weights: Array, tokens: Array) -> Array:
    """sum_i a_i h_i: [..., N] weights, [..., N, D] tokens -> [..., D]."""
    return jnp.einsum("...n,...nd->...d", weights, tokens.astype(jnp.float32))
