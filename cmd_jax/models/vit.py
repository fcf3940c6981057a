"""Vision transformer of DINO and EsViT (pre-norm, class token, learned position table), as pure flax modules.

Letters: B images, N patches, R registers, T = 1 + R + N tokens, D width, H heads.
"""

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.models.layers import (
    Attention,
    Remat,
    Segments,
    branch_keys,
    drop_path_rates,
    keep_factors,
    layer_norm,
    patch_embedding,
    pre_norm_block,
    remat_policy,
    self_attention,
    split_segments,
    table_init,
)

Array = jax.Array
Named = dict[str, Array | tuple[Array, ...]]
ResampleRule = Literal["dino", "esvit"]


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


class SelfAttention(nn.Module):
    """Self-attention over all tokens of an image."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32
    implementation: Attention = "xla"

    @nn.compact
    def __call__(self, tokens: Array, segments: Segments) -> tuple[Array, tuple[Array, ...]]:
        """tokens: [B, R, D] -> ([B, R, D], attention probabilities [B * V, H, T, T] float32 of every segment)."""
        return self_attention(tokens, self.num_heads, self.dtype, segments=segments, implementation=self.implementation)


class Block(nn.Module):
    """Pre-norm transformer block."""

    num_heads: int
    mlp_ratio: float = 4.0
    layer_norm_eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    attention: Attention = "xla"

    @nn.compact
    def __call__(self, tokens: Array, factors: tuple, segments: Segments) -> tuple[Array, tuple[Array, ...]]:
        """tokens: [B, R, D]; factors: of stochastic depth, two of [B, R, 1] or None -> as `SelfAttention`."""
        attention = SelfAttention(self.num_heads, self.dtype, self.attention, name="attn")
        mix = lambda x: attention(x, segments)
        return pre_norm_block(tokens, mix, factors, self.mlp_ratio, self.layer_norm_eps, self.dtype)


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
        layer_norm_eps: epsilon of the norms.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
        resample_rule: see `resample_positions`.
        dtype: of activations; parameters are float32.
        scan_blocks: all blocks but the last as one loop: compiles faster, and on CPUs runs faster.
        remat: what a block keeps for the backward pass, see `layers.remat_policy`.
        attention: implementation, see `layers.attend`.
    """

    patch_size: int
    width: int
    depth: int
    num_heads: int
    table_px: int
    registers: int = 0
    mlp_ratio: float = 4.0
    layer_norm_eps: float = 1e-6
    drop_path_rate: float = 0.0
    resample_rule: ResampleRule = "dino"
    dtype: jnp.dtype = jnp.float32
    scan_blocks: bool = False
    remat: Remat = "none"
    attention: Attention = "xla"

    def __call__(self, images: Array) -> Named:
        """Encodes normalised images [B, height, width, 3]: `encode` of one group of one view."""
        return self.encode((images[:, None],))[0]

    @nn.compact
    def encode(self, groups: tuple[Array, ...], keys: Array | None = None, first: int = 0) -> tuple[Named, ...]:
        """Encodes groups of views of different sizes: side by side in one row of tokens for each image.

        Norms and linear layers then run once over the whole row, attention over each view by itself.

        Args:
            groups: [B, V, height, width, 3] float each; sides are multiples of the patch size.
            keys: [B] random keys of stochastic depth, one for each image; None (the teacher, evaluation) keeps every branch.
            first: number of the first group among all that share the keys.

        Returns:
            For each group cls_token [B * V, D] and patch_tokens [B * V, N, D] after the final norm; attention
            [B * V, H, T, T], the last block's probabilities, class token first, then registers; blocks, a tuple of every
            block's tokens [B * V, T, D] after the final norm; positions [1, 1 + N, D], the table as added to class token
            and patches.
        """
        batch = groups[0].shape[0]
        embed = patch_embedding(self.width, self.patch_size, self.dtype)
        side = self.table_px // self.patch_size
        cls_token = self.param("cls_token", table_init, (1, 1, self.width))
        table = self.param("pos_embed", table_init, (1, 1 + side * side, self.width))
        registers = self.param("register_tokens", table_init, (1, self.registers, self.width)) if self.registers else None
        rows, positions, segments = [], [], []
        for images in groups:
            _, views, height, width, _ = images.shape
            if height % self.patch_size or width % self.patch_size:
                raise ValueError(f"an image of {height}x{width} px does not divide into patches of {self.patch_size} px")
            grid = (height // self.patch_size, width // self.patch_size)
            tokens = embed(images.reshape(-1, *images.shape[2:]).astype(self.dtype)).reshape(batch * views, -1, self.width)
            position = jnp.concatenate([table[0, :1], resample_positions(table[0, 1:], grid, self.resample_rule)])[None]
            special = cls_token + position[:, :1]
            if registers is not None:
                special = jnp.concatenate([special, registers], axis=1)
            special = jnp.broadcast_to(special, (batch * views, *special.shape[1:])).astype(self.dtype)
            tokens = jnp.concatenate([special, tokens + position[:, 1:].astype(self.dtype)], axis=1)
            segments.append((views, tokens.shape[1]))
            rows.append(tokens.reshape(batch, -1, self.width))  # [B * V, T, D] -> [B, V * T, D]
            positions.append(position)
        segments = tuple(segments)
        row = rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)
        outputs, attention = self._blocks(row, segments, keys if self.drop_path_rate else None, first)
        norm = layer_norm(self.dtype, self.layer_norm_eps, "norm")
        blocks = [split_segments(norm(tokens), segments) for tokens in outputs]
        return tuple(
            {
                "cls_token": blocks[-1][index][:, 0],
                "patch_tokens": blocks[-1][index][:, 1 + self.registers :],
                "attention": attention[index],
                "blocks": tuple(block[index] for block in blocks),
                "positions": positions[index],
            }
            for index in range(len(groups))
        )

    def _blocks(self, row: Array, segments: Segments, keys: Array | None, first: int) -> tuple[list[Array], tuple[Array, ...]]:
        """Every block's output [B, R, D], and the attention of the last."""
        block = Block(self.num_heads, self.mlp_ratio, self.layer_norm_eps, self.dtype, self.attention, parent=None)
        # The blocks are functions of their parameters, so that one loop over all of them needs no other parameter tree.
        init = lambda rng: block.init(rng, row[:1], (None, None), segments)["params"]
        params = [self.param(f"blocks_{index}", init) for index in range(self.depth)]
        rates = drop_path_rates(self.drop_path_rate, self.depth)

        def apply(params: dict, row: Array, number: Array | int, rate: Array | float) -> tuple[Array, tuple[Array, ...]]:
            factors = (None, None)
            if keys is not None:
                factors = tuple(keep_factors(branch, rate, segments, first) for branch in branch_keys(keys, number))
            return block.apply({"params": params}, row, factors, segments)

        if self.remat != "none":
            apply = jax.checkpoint(apply, policy=remat_policy(self.remat))
        outputs, start = [], 0
        if self.scan_blocks and not self.is_initializing():
            start = self.depth - 1  # the last block's attention is read by name
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params[:start])

            def body(row: Array, block: tuple) -> tuple[Array, Array]:
                row, _ = apply(block[0], row, *block[1:])
                return row, row

            row, scanned = jax.lax.scan(body, row, (stacked, jnp.arange(start), jnp.array(rates[:start])))
            outputs = list(scanned)
        for index in range(start, self.depth):
            row, attention = apply(params[index], row, index, rates[index])
            outputs.append(row)
        return outputs, attention
