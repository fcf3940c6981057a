"""Vision transformer of DINO and EsViT (pre-norm, class token, learned position table), as pure flax modules.

Letters: B images, N patches, R registers, T = 1 + R + N tokens, D width, H heads.
"""

import math
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.models.layers import (
    drop_path_rates,
    layer_norm,
    patch_embedding,
    pre_norm_block,
    self_attention,
    table_init,
)

Array = jax.Array
ResampleRule = Literal["dino", "esvit"]


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


class Attention(nn.Module):
    """Self-attention over all tokens of an image."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array) -> tuple[Array, Array]:
        """tokens: [B, T, D] -> ([B, T, D], attention probabilities [B, H, T, T] float32)."""
        return self_attention(tokens, self.num_heads, self.dtype)


class Block(nn.Module):
    """Pre-norm transformer block."""

    num_heads: int
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, *, train: bool) -> tuple[Array, Array]:
        keys = jax.random.split(self.make_rng("drop_path")) if train and self.drop_path_rate > 0 else (None, None)
        mix = Attention(self.num_heads, self.dtype, name="attn")
        return pre_norm_block(tokens, mix, keys, self.drop_path_rate, self.mlp_ratio, self.dtype)


class ViT(nn.Module):
    """Vision transformer that returns its intermediates by name.

    Attributes:
        patch_size: side of a patch in pixels.
        width: D.
        depth: number of blocks.
        num_heads: H.
        table_px: image side in pixels for which the position table is learned; other sizes resample it.
        registers: R, learned tokens after the class token, without position, that belong to no patch (arXiv 2309.16588).
        mlp_ratio: hidden width of the MLPs over D.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
        resample_rule: see `resample_positions`.
        dtype: of activations; parameters are float32.
    """

    patch_size: int
    width: int
    depth: int
    num_heads: int
    table_px: int
    registers: int = 0
    mlp_ratio: float = 4.0
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
            probabilities, class token first, then registers; blocks, a tuple of every block's tokens [B, T, D] after the
            final norm; positions [1, 1 + N, D], the table as added to class token and patches.
        """
        batch, height, width, _ = images.shape
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"an image of {height}x{width} px does not divide into patches of {self.patch_size} px")
        grid = (height // self.patch_size, width // self.patch_size)
        embed = patch_embedding(self.width, self.patch_size, self.dtype)
        tokens = embed(images.astype(self.dtype)).reshape(batch, -1, self.width)
        side = self.table_px // self.patch_size
        cls_token = self.param("cls_token", table_init, (1, 1, self.width))
        table = self.param("pos_embed", table_init, (1, 1 + side * side, self.width))
        positions = jnp.concatenate([table[0, :1], resample_positions(table[0, 1:], grid, self.resample_rule)])[None]
        tokens = tokens + positions[:, 1:].astype(self.dtype)
        first = cls_token + positions[:, :1]
        if self.registers:
            registers = self.param("register_tokens", table_init, (1, self.registers, self.width))
            first = jnp.concatenate([first, registers], axis=1)
        first = jnp.broadcast_to(first, (batch, *first.shape[1:])).astype(self.dtype)
        tokens = jnp.concatenate([first, tokens], axis=1)

        outputs = []
        for index, rate in enumerate(drop_path_rates(self.drop_path_rate, self.depth)):
            block = Block(self.num_heads, self.mlp_ratio, rate, self.dtype, name=f"blocks_{index}")
            tokens, attention = block(tokens, train=train)
            outputs.append(tokens)
        norm = layer_norm(self.dtype, "norm")
        blocks = tuple(norm(tokens) for tokens in outputs)
        return {
            "cls_token": blocks[-1][:, 0],
            "patch_tokens": blocks[-1][:, 1 + self.registers :],
            "attention": attention,
            "blocks": blocks,
            "positions": positions,
        }
