"""Vision transformer of DINO and EsViT (pre-norm, class token, learned position table), as pure flax modules.

Letters: B images, N patches, T = N + 1 tokens, D width, H heads.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
ResampleRule = Literal["dino", "esvit"]
LAYER_NORM_EPS = 1e-6  # of DINO and EsViT


class Size(NamedTuple):
    """Architecture of a named model."""

    width: int
    depth: int
    heads: int


# "micro" is ours, for two CPU cores; the others are DINO's.
SIZES = {
    "vit_micro": Size(96, 2, 3),
    "vit_tiny": Size(192, 12, 3),
    "vit_small": Size(384, 12, 6),
    "vit_base": Size(768, 12, 12),
}

# 1/sqrt(fan_in). DINO's fixed 0.02 is about that for widths of 384 and up, but leaves the small sizes almost linear.
_kernel_init = nn.initializers.lecun_normal()
_table_init = nn.initializers.truncated_normal(0.02)


def bicubic_matrix(table_side: int, patches: int, scale: float) -> np.ndarray:
    """Weights of torch's bicubic interpolation along one axis, [patches, table_side] float64.

    Kernel A = -0.75, no antialias, border taps clamped, source coordinate (i + 0.5) / scale - 0.5.
    """

    def cubic(x: np.ndarray) -> np.ndarray:
        x, a = np.abs(x), -0.75
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((x - 5) * x + 8) * a * x - 4 * a
        return np.where(x <= 1, near, np.where(x < 2, far, 0.0))

    source = (np.arange(patches) + 0.5) / scale - 0.5
    first = np.floor(source).astype(int) - 1
    matrix = np.zeros((patches, table_side))
    for tap in range(4):
        column = np.clip(first + tap, 0, table_side - 1)
        np.add.at(matrix, (np.arange(patches), column), cubic(source - (first + tap)))
    return matrix


def resample_positions(table: Array, grid: tuple[int, int], rule: ResampleRule = "dino") -> Array:
    """Fits the patch part of a position table to another patch grid.

    Args:
        table: [S * S, D] float32, row-major.
        grid: (rows, columns) of patches.
        rule: how the source coordinate is scaled: "dino" (patches + 0.1) / S on each axis, "esvit" sqrt(N / S^2) on both.

    Returns:
        [rows * columns, D] float32.
    """
    side, width = math.isqrt(table.shape[0]), table.shape[1]
    if grid == (side, side):
        return table
    rows, columns = grid
    if rule == "dino":
        scale_y, scale_x = (rows + 0.1) / side, (columns + 0.1) / side
    else:
        scale_y = scale_x = math.sqrt(rows * columns / table.shape[0])
    along_y = jnp.asarray(bicubic_matrix(side, rows, scale_y), table.dtype)
    along_x = jnp.asarray(bicubic_matrix(side, columns, scale_x), table.dtype)
    fitted = jnp.einsum("ri,cj,ijd->rcd", along_y, along_x, table.reshape(side, side, width), precision="highest")
    return fitted.reshape(rows * columns, width)


def layer_norm(dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """LayerNorm with the references' epsilon; flax computes its statistics in float32."""
    return nn.LayerNorm(epsilon=LAYER_NORM_EPS, use_fast_variance=False, dtype=dtype, name=name)


class Attention(nn.Module):
    """Multi-head self-attention with packed q, k, v; the softmax is float32."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array) -> tuple[Array, Array]:
        """tokens: [B, T, D] -> ([B, T, D], attention probabilities [B, H, T, T] float32)."""
        batch, length, width = tokens.shape
        dense: Callable = lambda features, name: nn.Dense(features, dtype=self.dtype, kernel_init=_kernel_init, name=name)
        # [B, T, 3D] -> 3 x [B, T, H, D/H]
        q, k, v = jnp.moveaxis(dense(3 * width, "qkv")(tokens).reshape(batch, length, 3, self.num_heads, -1), 2, 0)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * (width // self.num_heads) ** -0.5
        attention = jax.nn.softmax(logits, axis=-1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", attention.astype(self.dtype), v)
        return dense(width, "proj")(mixed.reshape(batch, length, width)), attention


class MLP(nn.Module):
    """Two linear layers with exact (erf) GELU."""

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        x = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=_kernel_init, name="fc1")(x)
        x = nn.gelu(x, approximate=False)
        return nn.Dense(width, dtype=self.dtype, kernel_init=_kernel_init, name="fc2")(x)


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


class Block(nn.Module):
    """Pre-norm transformer block."""

    num_heads: int
    drop_path_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, *, train: bool) -> tuple[Array, Array]:
        keys = jax.random.split(self.make_rng("drop_path")) if train and self.drop_path_rate > 0 else (None, None)
        mixed, attention = Attention(self.num_heads, self.dtype, name="attn")(layer_norm(self.dtype, "norm1")(tokens))
        tokens = tokens + drop_path(mixed, self.drop_path_rate, keys[0])
        mixed = MLP(4 * tokens.shape[-1], self.dtype, name="mlp")(layer_norm(self.dtype, "norm2")(tokens))
        return tokens + drop_path(mixed, self.drop_path_rate, keys[1]), attention


class ViT(nn.Module):
    """Vision transformer that returns its intermediates by name.

    Attributes:
        patch_size: side of a patch in pixels.
        width: D.
        depth: number of blocks.
        num_heads: H.
        table_px: image side in pixels for which the position table is learned; other sizes resample it.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
        resample_rule: see `resample_positions`.
        dtype: of activations; parameters are float32.
    """

    patch_size: int
    width: int
    depth: int
    num_heads: int
    table_px: int
    drop_path_rate: float = 0.0
    resample_rule: ResampleRule = "dino"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> dict[str, Array | tuple[Array, ...]]:
        """Encodes normalised images.

        Args:
            images: [B, height, width, 3] float; sides are multiples of the patch size.
            train: draw stochastic depth from the "drop_path" stream.

        Returns:
            cls_token [B, D] and patch_tokens [B, N, D] after the final norm; attention [B, H, T, T], the last block's
            probabilities, class token first; blocks, a tuple of every block's tokens [B, T, D] after the final norm.
        """
        batch, height, width, _ = images.shape
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"an image of {height}x{width} px does not divide into patches of {self.patch_size} px")
        grid = (height // self.patch_size, width // self.patch_size)
        patch = (self.patch_size, self.patch_size)
        embed = nn.Conv(
            self.width, patch, strides=patch, padding="VALID", dtype=self.dtype, kernel_init=_kernel_init, name="patch_embed"
        )
        tokens = embed(images.astype(self.dtype)).reshape(batch, -1, self.width)
        side = self.table_px // self.patch_size
        cls_token = self.param("cls_token", _table_init, (1, 1, self.width))
        table = self.param("pos_embed", _table_init, (1, 1 + side * side, self.width))
        positions = jnp.concatenate([table[0, :1], resample_positions(table[0, 1:], grid, self.resample_rule)])
        tokens = jnp.concatenate([jnp.broadcast_to(cls_token, (batch, 1, self.width)).astype(self.dtype), tokens], axis=1)
        tokens = tokens + positions.astype(self.dtype)

        outputs = []
        for index in range(self.depth):
            rate = self.drop_path_rate * index / max(1, self.depth - 1)
            tokens, attention = Block(self.num_heads, rate, self.dtype, name=f"blocks_{index}")(tokens, train=train)
            outputs.append(tokens)
        norm = layer_norm(self.dtype, "norm")
        blocks = tuple(norm(tokens) for tokens in outputs)
        return {
            "cls_token": blocks[-1][:, 0],
            "patch_tokens": blocks[-1][:, 1:],
            "attention": attention,
            "blocks": blocks,
        }
