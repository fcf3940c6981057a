"""Attention-based multi-instance learning (Ilse, Tomczak, Welling, arXiv 1802.04712): patches are the instances of a bag."""

import jax
import jax.numpy as jnp

from cmd_jax.method.products import product

Array = jax.Array


def _rows(rows: Array, kernel: Array) -> Array:
    """[..., a], [a, b] -> [..., b] float32."""
    return product("...a,ab->...b", rows, kernel)


def gated_attention_scores(tokens: Array, tanh_kernel: Array, sigmoid_kernel: Array, out_kernel: Array) -> Array:
    """Scores e_hi = w_h . (tanh(V h_i) * sigmoid(U h_i)) of every patch, by every head h.

    Args:
        tokens: [..., N, D] patch embeddings h.
        tanh_kernel: [D, M], V.
        sigmoid_kernel: [D, M], U.
        out_kernel: [M, H], w.

    Returns:
        [..., H, N] float32 scores (logits of the MIL weights).
    """
    gated = jnp.tanh(_rows(tokens, tanh_kernel)) * jax.nn.sigmoid(_rows(tokens, sigmoid_kernel))
    return jnp.swapaxes(_rows(gated, out_kernel), -1, -2)


def attention_scores(tokens: Array, tanh_kernel: Array, out_kernel: Array) -> Array:
    """Scores e_hi = w_h . tanh(V h_i) of every patch, by every head h, without the gate.

    Args:
        tokens: [..., N, D] patch embeddings h.
        tanh_kernel: [D, M], V.
        out_kernel: [M, H], w.

    Returns:
        [..., H, N] float32 scores (logits of the MIL weights).
    """
    return jnp.swapaxes(_rows(jnp.tanh(_rows(tokens, tanh_kernel)), out_kernel), -1, -2)


def class_token_scores(attention: Array, patches: int) -> Array:
    """Scores e_hi = log A_hi: at temperature 1 the weights are a transformer's attention A, of its class token over patches.

    Not in the paper, whose scorer is one beside the backbone.

    Args:
        attention: [..., H, T, T] probabilities of a block, from the token of the second last axis: the class token first, the
            patches last.
        patches: N.

    Returns:
        [..., H, N] float32 scores (logits of the MIL weights).
    """
    of_patches = attention[..., 0, -patches:].astype(jnp.float32)
    return jnp.log(jnp.maximum(of_patches, jnp.finfo(jnp.float32).tiny))


def mil_weights(scores: Array, temp: float) -> Array:
    """a = softmax_i(e_i / temp): [..., N] scores -> [..., N] float32 weights that sum to 1."""
    return jax.nn.softmax(scores.astype(jnp.float32) / temp, axis=-1)


def relative_entropy(weights: Array) -> Array:
    """-sum_i a_i log a_i / log N: 1 is uniform, 0 a single patch.

    Args:
        weights: [..., N] MIL weights, sum to 1; N is 2 or more.

    Returns:
        [...] float32.
    """
    weights = weights.astype(jnp.float32)
    return -jnp.sum(jax.scipy.special.xlogy(weights, weights), axis=-1) / jnp.log(weights.shape[-1])


def bag_embedding(weights: Array, tokens: Array) -> Array:
    """sum_i a_hi h_i of every head h, joined: [..., H, N] weights, [..., N, D] tokens -> [..., H * D] float32."""
    bags = product("...hn,...nd->...hd", weights, tokens)
    return bags.reshape(*bags.shape[:-2], -1)
