"""Swin transformer of EsViT and CMD (arXiv 2103.14030), any window, as pure flax modules.

Window and shift of every block follow from the image side the model is configured for; inputs of any other size are padded
to whole windows. Letters: B images, M windows of an image, n = window^2 tokens of a window, N tokens, D width, H heads.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.models.layers import (
    MLP,
    Masked,
    Remat,
    branch_keys,
    drop_path_rates,
    keep_factors,
    kernel_init,
    layer_norm,
    patch_embedding,
    pre_norm_block,
    product_of,
    remat_policy,
    self_attention,
    table_init,
)
from cmd_jax.models.sizes import SWIN_PATCH_PX

Array = jax.Array
Named = dict[str, Array | tuple[Array, ...]]
MASKED = -100.0  # added to the logits between regions that only the cyclic shift made neighbours


def block_windows(grid: int, depths: tuple[int, ...], window: int) -> tuple[tuple[int, int], ...]:
    """(window, shift) of every block in order.

    A stage whose side is at most the window attends over the whole map without shift; otherwise its odd blocks are shifted
    by half a window.

    Args:
        grid: side in patches of the image the model is configured for; each stage halves it, rounding down.
        depths: blocks of each stage.
        window: the configured side of a window.
    """
    blocks = []
    for stage, depth in enumerate(depths):
        side = max(1, grid >> stage)
        whole = side <= window
        blocks += [(side if whole else window, 0 if whole or block % 2 == 0 else window // 2) for block in range(depth)]
    return tuple(blocks)


def relative_position_bias(table: Array, window: int) -> Array:
    """The row of the relative-position table for every (query, key) of a window: [(2 window - 1)^2, H] -> [H, n, n].

    Row (dy + window - 1) * (2 * window - 1) + dx + window - 1, with (dy, dx) = query - key. Rows are selected by products, one
    for each axis: the gradient of an indexed table adds up rows in no fixed order on a GPU.
    """
    offset = np.arange(window)[:, None] - np.arange(window) + window - 1  # [query, key]
    select = jax.nn.one_hot(offset, 2 * window - 1, dtype=table.dtype)
    square = table.reshape(2 * window - 1, 2 * window - 1, -1)
    bias = jnp.einsum("ydi,xej,ijh->hyxde", select, select, square, precision="highest")
    return bias.reshape(-1, window * window, window * window)


def to_windows(grid: Array | np.ndarray, window: int) -> Array | np.ndarray:
    """[B, rows, columns, C], sides multiples of the window -> [B * M, n, C], windows row-major within an image."""
    batch, rows, columns, channels = grid.shape
    split = grid.reshape(batch, rows // window, window, columns // window, window, channels)
    return split.swapaxes(2, 3).reshape(-1, window * window, channels)


def from_windows(windows: Array, window: int, rows: int, columns: int) -> Array:
    """Inverse of `to_windows`: [B * M, n, C] -> [B, rows, columns, C]."""
    split = windows.reshape(-1, rows // window, columns // window, window, window, windows.shape[-1])
    return split.swapaxes(2, 3).reshape(-1, rows, columns, windows.shape[-1])


def shift_mask(rows: int, columns: int, window: int, shift: int) -> np.ndarray:
    """What is added to the attention logits of the windows of a cyclically shifted map.

    Args:
        rows: of the padded map.
        columns: of the padded map.
        window: side of a window.
        shift: 0 < shift < window.

    Returns:
        [M, n, n] float32: 0 between tokens that were neighbours before the shift, else MASKED.
    """

    def band(length: int) -> np.ndarray:
        # 0 up to the last window, 1 its tokens that stayed in place, 2 those that came round from the other end
        position = np.arange(length)
        return (position >= length - window).astype(int) + (position >= length - shift)

    region = 3 * band(rows)[:, None] + band(columns)[None]
    labels = to_windows(region[None, :, :, None], window)[..., 0]  # [M, n]
    return np.where(labels[:, :, None] == labels[:, None, :], 0.0, MASKED).astype(np.float32)


def pad_map(grid: Array, rows: int, columns: int) -> Array:
    """[B, R, C, D] with zeros at the bottom and the right: [B, R + rows, C + columns, D]."""
    if not rows and not columns:  # an operation that does nothing would stay in an exported program
        return grid
    return jnp.pad(grid, ((0, 0), (0, rows), (0, columns), (0, 0)))


class WindowAttention(nn.Module):
    """Attention within (shifted) windows of a map, with a learned bias for every relative position."""

    num_heads: int
    window: int
    shift: int
    dtype: jnp.dtype = jnp.float32
    product_dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, grid: Array) -> tuple[Array, Array]:
        """grid: [B, rows, columns, D] -> (the same, attention probabilities [B * M, H, n, n] float32)."""
        window, (batch, rows, columns) = self.window, grid.shape[:3]
        # Pad tokens are ordinary keys: only the mask of the shift keeps windows' regions apart, as in the reference.
        padded = pad_map(grid, -rows % window, -columns % window)
        height, breadth = padded.shape[1:3]
        table = self.param("relative_position_bias_table", table_init, ((2 * window - 1) ** 2, self.num_heads))
        bias = relative_position_bias(table, window)[None]  # [1, H, n, n]
        if self.shift:
            padded = jnp.roll(padded, (-self.shift, -self.shift), axis=(1, 2))
            mask = shift_mask(height, breadth, window, self.shift)
            bias = jnp.tile(bias + mask[:, None], (batch, 1, 1, 1))  # [B * M, H, n, n]
        tokens, options = to_windows(padded, window), {"product_dtype": self.product_dtype}
        mixed, (attention,) = self_attention(tokens, self.num_heads, self.dtype, bias, **options)
        mixed = from_windows(mixed, window, height, breadth)
        if self.shift:
            mixed = jnp.roll(mixed, (self.shift, self.shift), axis=(1, 2))
        return mixed[:, :rows, :columns], attention


class SwinBlock(nn.Module):
    """Pre-norm block on a map [B, rows, columns, D]."""

    num_heads: int
    window: int
    shift: int
    mlp_ratio: float = 4.0
    layer_norm_eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    product_dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, grid: Array, factors: tuple) -> tuple[Array, Array]:
        """grid: [B, rows, columns, D]; factors: of stochastic depth, two of [B, 1, 1, 1] or None -> as `WindowAttention`."""
        mix = WindowAttention(self.num_heads, self.window, self.shift, self.dtype, self.product_dtype, name="attn")
        mlp = MLP(round(self.mlp_ratio * grid.shape[-1]), self.dtype, product_dtype=self.product_dtype, name="mlp")
        return pre_norm_block(grid, mix, mlp, factors, self.layer_norm_eps, self.dtype)


class PatchMerging(nn.Module):
    """2 x 2 tokens become one of twice the width; an odd map is padded with zeros at the bottom and the right."""

    layer_norm_eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    product_dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, grid: Array) -> Array:
        """grid: [B, rows, columns, D] -> [B, ceil(rows / 2), ceil(columns / 2), 2D]."""
        _, rows, columns, width = grid.shape
        grid = pad_map(grid, rows % 2, columns % 2)
        corners = [grid[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        merged = layer_norm(self.dtype, self.layer_norm_eps, "norm")(jnp.concatenate(corners, axis=-1))
        options = {"kernel_init": kernel_init, "dot_general": product_of(self.dtype, self.product_dtype)}
        return nn.Dense(2 * width, use_bias=False, dtype=self.dtype, name="reduction", **options)(merged)


class Swin(nn.Module):
    """Swin transformer that returns its intermediates by name.

    Attributes:
        width: of the first stage; every merging doubles it.
        depths: blocks of each stage.
        num_heads: of each stage.
        window: side of a window in tokens.
        table_px: image side in pixels that decides every block's window and shift, see `block_windows`.
        patch_size: side of a patch in pixels.
        mlp_ratio: hidden width of the MLPs over D.
        layer_norm_eps: epsilon of the norms.
        drop_path_rate: stochastic depth of the last block, growing linearly over all blocks from 0 at the first.
        dtype: of activations; parameters are float32.
        product_dtype: of the operands of the blocks' linear layers; None: `dtype`.
        remat: what a block keeps for the backward pass: "none" all of it, else see `layers.remat_policy`.
    """

    width: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window: int
    table_px: int
    patch_size: int = SWIN_PATCH_PX
    mlp_ratio: float = 4.0
    layer_norm_eps: float = 1e-6
    drop_path_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32
    product_dtype: jnp.dtype | None = None
    remat: Remat = "none"

    def encode(
        self, groups: tuple[Array, ...], keys: Array | None = None, first: int = 0, masked: Masked | None = None
    ) -> tuple[Named, ...]:
        """Encodes groups of views [B, V, height, width, 3], one group after the other; arguments as of `vit.ViT.encode`."""
        flat = lambda images: images.reshape(-1, *images.shape[2:])
        of_group = lambda number: masked if number == first else None
        return tuple(self(flat(images), keys, number, of_group(number)) for number, images in enumerate(groups, first))

    @nn.compact
    def __call__(self, images: Array, keys: Array | None = None, group: int = 0, masked: Masked | None = None) -> Named:
        """Encodes normalised images.

        Args:
            images: [B, height, width, 3] float of any size; pixels beyond the last whole patch are not read.
            keys: of stochastic depth, one for each of the B / V source images that have V views in a row; None (the teacher,
                evaluation) keeps every branch.
            group: number of the images' group among all that share the keys.
            masked: what is not seen, by patches of the last stage: all patches embedded within one are masked (iBOT).

        Returns:
            patch_tokens [B, N, D] of the last stage after the final norm, row-major; attention [B * M, H, n, n], the last
            block's probabilities; blocks, a tuple of every block's tokens [B, N_i, D_i], those of the last stage after the
            final norm, those of the others before their merging; embedded [B, N_0, D_0], the normed patch embedding;
            stages, a tuple of every stage's tokens after its merging and before the final norm.
        """
        flat = lambda grid: grid.reshape(grid.shape[0], -1, grid.shape[-1])
        grid = patch_embedding(self.width, self.patch_size, self.dtype)(images.astype(self.dtype))
        grid = layer_norm(self.dtype, self.layer_norm_eps, "patch_norm")(grid)
        if masked is not None:
            rows, columns = grid.shape[1:3]
            side, stride = math.isqrt(masked.masks.shape[-1]), 2 ** (len(self.depths) - 1)
            hidden = masked.masks.reshape(-1, side, side, 1).repeat(stride, axis=1).repeat(stride, axis=2)
            grid = jnp.where(hidden[:, :rows, :columns], masked.token[None].astype(self.dtype), grid)
        embedded = flat(grid)
        windows = iter(block_windows(self.table_px // self.patch_size, self.depths, self.window))
        rates = iter(drop_path_rates(self.drop_path_rate, sum(self.depths)))
        norm = layer_norm(self.dtype, self.layer_norm_eps, "norm")
        blocks, stages = [], []
        block_type = SwinBlock if self.remat == "none" else nn.remat(SwinBlock, policy=remat_policy(self.remat))
        views = 1 if keys is None else images.shape[0] // keys.shape[0]
        draw = lambda keys, rate: keep_factors(keys, rate, ((views, 1),), group).reshape(-1, 1, 1, 1)
        for stage, (depth, heads) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            last = stage == len(self.depths) - 1
            for index in range(depth):
                name = f"layers_{stage}_blocks_{index}"
                rate, factors = next(rates), (None, None)
                if keys is not None and rate:
                    factors = tuple(draw(branch, rate) for branch in branch_keys(keys, len(blocks)))
                window, shift = next(windows)
                options = {"dtype": self.dtype, "product_dtype": self.product_dtype, "name": name}
                block = block_type(heads, window, shift, self.mlp_ratio, self.layer_norm_eps, **options)
                grid, attention = block(grid, factors)
                blocks.append(norm(flat(grid)) if last else flat(grid))
            if not last:
                grid = PatchMerging(self.layer_norm_eps, self.dtype, self.product_dtype, name=f"layers_{stage}_downsample")(
                    grid
                )
            stages.append(flat(grid))
        return {
            "patch_tokens": blocks[-1],
            "attention": attention,
            "blocks": tuple(blocks),
            "embedded": embedded,
            "stages": tuple(stages),
        }
