"""What the backbones share: norm, MLP, self-attention, stochastic depth, initial values.

Letters: B images (or windows), T tokens, D width, H heads.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
LAYER_NORM_EPS = 1e-6  # of DINO and EsViT

# 1/sqrt(fan_in). DINO's fixed 0.02 is about that for widths of 384 and up, but leaves the small sizes almost linear.
kernel_init = nn.initializers.lecun_normal()
table_init = nn.initializers.truncated_normal(0.02)


def layer_norm(dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """LayerNorm with the references' epsilon; flax computes its statistics in float32."""
    return nn.LayerNorm(epsilon=LAYER_NORM_EPS, use_fast_variance=False, dtype=dtype, name=name)


def patch_embedding(width: int, patch_px: int, dtype: jnp.dtype) -> nn.Conv:
    """Linear map of each patch_px x patch_px square of pixels; pixels beyond the last whole square are not read."""
    patch = (patch_px, patch_px)
    return nn.Conv(width, patch, strides=patch, padding="VALID", dtype=dtype, kernel_init=kernel_init, name="patch_embed")


def self_attention(tokens: Array, num_heads: int, dtype: jnp.dtype, bias: Array | None = None) -> tuple[Array, Array]:
    """Multi-head self-attention with packed q, k, v; called inside a compact method, whose module gets `qkv` and `proj`.

    Args:
        tokens: [B, T, D].
        num_heads: H.
        dtype: of the products; the softmax is float32.
        bias: added to the logits; [B, H, T, T] or what broadcasts to it.

    Returns:
        [B, T, D] and the attention probabilities [B, H, T, T] float32.
    """
    batch, length, width = tokens.shape
    packed = nn.Dense(3 * width, dtype=dtype, kernel_init=kernel_init, name="qkv")(tokens)
    # [B, T, 3D] -> 3 x [B, T, H, D/H]
    q, k, v = jnp.moveaxis(packed.reshape(batch, length, 3, num_heads, -1), 2, 0)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * (width // num_heads) ** -0.5
    attention = jax.nn.softmax(logits if bias is None else logits + bias, axis=-1)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", attention.astype(dtype), v).reshape(batch, length, width)
    return nn.Dense(width, dtype=dtype, kernel_init=kernel_init, name="proj")(mixed), attention


class MLP(nn.Module):
    """Two linear layers with exact (erf) GELU."""

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        x = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=kernel_init, name="fc1")(x)
        x = nn.gelu(x, approximate=False)
        return nn.Dense(width, dtype=self.dtype, kernel_init=kernel_init, name="fc2")(x)


def drop_path(branch: Array, rate: float, key: Array | None) -> Array:
    """Stochastic depth: drops a sample's residual branch with probability `rate` and rescales the rest.

    Args:
        branch: [B, ...].
        rate: probability in 0..1.
        key: random key; None (the teacher, evaluation) keeps every branch.
    """
    if key is None or rate == 0.0:
        return branch
    keep = jax.random.bernoulli(key, 1.0 - rate, (branch.shape[0],) + (1,) * (branch.ndim - 1))
    return jnp.where(keep, branch / (1.0 - rate), 0.0).astype(branch.dtype)


def drop_path_rates(rate: float, depth: int) -> tuple[float, ...]:
    """Rates of `depth` blocks in order: linearly from 0 at the first to `rate` at the last."""
    return tuple(rate * index / max(1, depth - 1) for index in range(depth))


def pre_norm_block(
    tokens: Array, mix: Callable[[Array], tuple[Array, Array]], keys: tuple, rate: float, mlp_ratio: float, dtype: jnp.dtype
) -> tuple[Array, Array]:
    """x + mix(norm(x)), then x + MLP(norm(x)); called inside a compact method, whose module gets `norm1`, `norm2`, `mlp`.

    Args:
        tokens: [B, ..., D].
        mix: tokens -> (tokens, attention probabilities).
        keys: two random keys of stochastic depth, or two None to keep both branches.
        rate: of stochastic depth.
        mlp_ratio: hidden width of the MLP over D.
        dtype: of activations.

    Returns:
        [B, ..., D] and the attention probabilities.
    """
    mixed, attention = mix(layer_norm(dtype, "norm1")(tokens))
    tokens = tokens + drop_path(mixed, rate, keys[0])
    mixed = MLP(round(mlp_ratio * tokens.shape[-1]), dtype, name="mlp")(layer_norm(dtype, "norm2")(tokens))
    return tokens + drop_path(mixed, rate, keys[1]), attention
