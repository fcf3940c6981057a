"""One vision transformer with the options of those that the field starts from, as pure flax modules.

DINO, EsViT, iBOT, MAE and MoCo v3 have a class token and a learned table of positions; DINOv2 adds LayerScale, gated MLPs and
registers, DINOv3 rotary positions; CLIP has a norm before the blocks.
Letters: B images, N patches, R registers, C = 1 class token or 0, T = C + R + N tokens, D width, H heads.
"""

import itertools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.models.layers import (
    MLP,
    Attention,
    Masked,
    Remat,
    Rotation,
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
from cmd_jax.models.sizes import Activation, Positions, QKVBias, ResampleRule

Array = jax.Array
Named = dict[str, Array | tuple[Array, ...]]
LAYER_SCALE = 1e-5  # initial


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel with parameter a."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def bicubic_matrix(table_side: int, patches: int, scale: float) -> np.ndarray:
    """Weights of torch's bicubic interpolation along one axis, [patches, table_side] float64.

    Kernel a = -0.75, no antialias, border taps clamped, source coordinate (i + 0.5) / scale - 0.5.
    """
    source = (np.arange(patches) + 0.5) / scale - 0.5
    first = np.floor(source).astype(int) - 1
    matrix = np.zeros((patches, table_side))
    for tap in range(4):
        column = np.clip(first + tap, 0, table_side - 1)
        np.add.at(matrix, (np.arange(patches), column), cubic(source - (first + tap), -0.75))
    return matrix


def antialiased_matrix(table_side: int, patches: int) -> np.ndarray:
    """Weights of torch's bicubic interpolation with antialias=True along one axis, [patches, table_side] float64.

    Kernel a = -0.5, as wide as 4 of the sparser points; what lies beyond the border has no weight, and the rest sums to 1.
    """
    step = table_side / patches
    center = (np.arange(patches)[:, None] + 0.5) * step - 0.5
    weights = cubic((np.arange(table_side) - center) / max(1.0, step), -0.5)
    return weights / weights.sum(axis=1, keepdims=True)


def resample_positions(table: Array, grid: tuple[int, int], rule: ResampleRule = "dino") -> Array:
    """Fits the patch part of a position table to another patch grid.

    Args:
        table: [S * S, D] float32, row-major.
        grid: (rows, columns) of patches.
        rule: of bicubic interpolation. Without antialias the source coordinate is scaled by (patches + 0.1) / S on each axis
            ("dino"), patches / S ("size": transformers' ViT, Dinov2 and CLIP) or on both sqrt(N / S^2) ("esvit");
            "antialiased" is `antialiased_matrix` (timm, OpenCLIP, DINOv2 with registers).

    Returns:
        [rows * columns, D] float32.
    """
    side, width = math.isqrt(table.shape[0]), table.shape[1]
    if grid == (side, side):
        return table
    rows, columns = grid
    along = {
        "dino": lambda patches: bicubic_matrix(side, patches, (patches + 0.1) / side),
        "size": lambda patches: bicubic_matrix(side, patches, patches / side),
        "esvit": lambda patches: bicubic_matrix(side, patches, math.sqrt(rows * columns / table.shape[0])),
        "antialiased": lambda patches: antialiased_matrix(side, patches),
    }[rule]
    along_y, along_x = (jnp.asarray(along(patches), table.dtype) for patches in grid)
    fitted = jnp.einsum("ri,cj,ijd->rcd", along_y, along_x, table.reshape(side, side, width), precision="highest")
    return fitted.reshape(rows * columns, width)


def add_positions(tokens: list[Array], positions: Array) -> list[Array]:
    """Adds the rows [1, m, D] to the first m of the tokens, of several kinds [1, n, D]; a kind has all its rows or none."""
    added, start = [], 0
    for kind in tokens:
        stop = start + kind.shape[1]
        added.append(kind + positions[:, start:stop] if stop <= positions.shape[1] else kind)
        start = stop
    return added


def rotary(grid: tuple[int, int], special: int, channels: int, base: float) -> Rotation:
    """Rotations of DINOv3: by the centres of the patches in an image of -1..1 on each axis, whatever its size.

    A quarter of a head's channels rotates by the row and a quarter by the column, `rotate` pairs them with the other half; of
    frequency k of a quarter the angle is 2 pi x / base^(4 k / channels).

    Args:
        grid: (rows, columns) of patches.
        special: tokens before the patches, which do not rotate.
        channels: D/H, a multiple of 4.
        base: of the frequencies.

    Returns:
        Cosines and sines, [1, special + N, 1, channels / 2] float32.
    """
    frequency = base ** (-4 / channels * np.arange(channels // 4))
    angles = [2 * np.pi * ((2 * np.arange(side) + 1) / side - 1)[:, None] * frequency for side in grid]
    shape = (*grid, channels // 4)

    def table(function: Callable[[np.ndarray], np.ndarray], still: float) -> Array:
        along_y, along_x = (jnp.asarray(function(angle), jnp.float32) for angle in angles)
        of_patches = jnp.concatenate(
            [jnp.broadcast_to(along_y[:, None], shape), jnp.broadcast_to(along_x[None], shape)], axis=-1
        )
        of_special = jnp.full((special, channels // 2), still, jnp.float32)
        return jnp.concatenate([of_special, of_patches.reshape(-1, channels // 2)])[None, :, None]

    return table(np.cos, 1.0), table(np.sin, 0.0)


class Block(nn.Module):
    """Pre-norm transformer block; the attributes are those of `ViT`."""

    num_heads: int
    mlp_dim: int
    layer_norm_eps: float
    dtype: jnp.dtype
    attention: Attention
    layer_scale: bool
    gated_mlp: bool
    activation: Activation
    qkv_bias: QKVBias
    product_dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(
        self, tokens: Array, factors: tuple, segments: Segments, rotations: tuple[Rotation, ...] | None
    ) -> tuple[Array, tuple[Array, ...]]:
        """tokens: [B, R, D]; factors: of stochastic depth, two of [B, R, 1] or None -> as `layers.self_attention`."""
        attention = SelfAttention(self.num_heads, self.dtype, self.attention, self.qkv_bias, self.product_dtype, name="attn")
        mlp = MLP(self.mlp_dim, self.dtype, self.activation, self.gated_mlp, self.product_dtype, name="mlp")

        def scaled(branch: Array, name: str) -> Array:
            if not self.layer_scale:
                return branch
            scale = self.param(name, nn.initializers.constant(LAYER_SCALE), branch.shape[-1:])
            return branch * scale.astype(branch.dtype)[None, None]

        def mix(tokens: Array) -> tuple[Array, tuple[Array, ...]]:
            mixed, probs = attention(tokens, segments, rotations)
            return scaled(mixed, "ls1"), probs

        feed = lambda tokens: scaled(mlp(tokens), "ls2")
        return pre_norm_block(tokens, mix, feed, factors, self.layer_norm_eps, self.dtype)


class SelfAttention(nn.Module):
    """Self-attention over all tokens of an image; the attributes are arguments of `layers.self_attention`."""

    num_heads: int
    dtype: jnp.dtype
    implementation: Attention
    qkv_bias: QKVBias
    product_dtype: jnp.dtype | None

    @nn.compact
    def __call__(
        self, tokens: Array, segments: Segments, rotations: tuple[Rotation, ...] | None
    ) -> tuple[Array, tuple[Array, ...]]:
        """tokens: [B, R, D] -> ([B, R, D], attention probabilities [B * V, H, T, T] float32 of every segment)."""
        options = {"implementation": self.implementation, "qkv_bias": self.qkv_bias, "product_dtype": self.product_dtype}
        return self_attention(tokens, self.num_heads, self.dtype, segments=segments, rotations=rotations, **options)


class ViT(nn.Module):
    """Vision transformer that returns its intermediates by name.

    Attributes:
        patch_size: side of a patch in pixels.
        width: D.
        depth: number of blocks.
        num_heads: H.
        mlp_dim: hidden width of the MLPs.
        table_px: image side in pixels for which the position table is learned; other sizes resample it.
        class_token: whether there is one.
        registers: R, learned tokens before the patches that belong to none (arXiv 2309.16588).
        positions: which tokens have a row of the position table: class token and patches ("class_patches"), registers too
            ("all"), patches alone; "rotary": none, attention rotates queries and keys of patches, see `rotary`.
        resample_rule: see `resample_positions`.
        rope_base: see `rotary`.
        layer_scale: a learned factor for each channel of a residual branch (arXiv 2103.17239).
        gated_mlp: see `layers.MLP`.
        activation: of the MLPs.
        pre_norm: a norm before the blocks, and no bias in the patch embedding (CLIP).
        qkv_bias: see `layers.PackedLinear`.
        layer_norm_eps: epsilon of the norms.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
        frozen_blocks: number of first blocks that get no gradient, nor does what stands before them.
        dtype: of activations; parameters are float32.
        product_dtype: of the operands of the blocks' linear layers; None: `dtype`.
        scan_blocks: all blocks but the last as one loop: compiles faster, and on CPUs runs faster.
        remat: what a block keeps for the backward pass, see `layers.remat_policy`.
        attention: implementation, see `layers.attend`.
    """

    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    table_px: int
    class_token: bool = True
    registers: int = 0
    positions: Positions = "class_patches"
    resample_rule: ResampleRule = "dino"
    rope_base: float = 100.0
    layer_scale: bool = False
    gated_mlp: bool = False
    activation: Activation = "gelu"
    pre_norm: bool = False
    qkv_bias: QKVBias = "qkv"
    layer_norm_eps: float = 1e-6
    drop_path_rate: float = 0.0
    frozen_blocks: int = 0
    dtype: jnp.dtype = jnp.float32
    product_dtype: jnp.dtype | None = None
    scan_blocks: bool = False
    remat: Remat = "none"
    attention: Attention = "xla"

    def __call__(self, images: Array) -> Named:
        """Encodes normalised images [B, height, width, 3]: `encode` of one group of one view."""
        return self.encode((images[:, None],))[0]

    @nn.compact
    def encode(
        self, groups: tuple[Array, ...], keys: Array | None = None, first: int = 0, masked: Masked | None = None
    ) -> tuple[Named, ...]:
        """Encodes groups of views of different sizes: side by side in one row of tokens for each image.

        Norms and linear layers then run once over the whole row, attention over each view by itself.

        Args:
            groups: [B, V, height, width, 3] float each; sides are multiples of the patch size.
            keys: [B] random keys of stochastic depth, one for each image; None (the teacher, evaluation) keeps every branch.
            first: number of the first group among all that share the keys.
            masked: patches of the first group that are not seen.

        Returns:
            For each group cls_token [B * V, D] where there is one and patch_tokens [B * V, N, D], after the final norm;
            attention [B * V, H, T, T], the last block's probabilities, class token first, then registers; blocks, a tuple of
            every block's tokens [B * V, T, D] after the final norm; but with rotary ones positions [1, P, D], the table as
            added to the P tokens that have them.
        """
        batch = groups[0].shape[0]
        embed = patch_embedding(self.width, self.patch_size, self.dtype, use_bias=not self.pre_norm)
        special = [self.param("cls_token", table_init, (1, 1, self.width))] if self.class_token else []
        before, side = self.class_token + self.registers, self.table_px // self.patch_size  # tokens before the patches
        placed = {"class_patches": int(self.class_token), "all": before}.get(self.positions, 0)  # those that have positions
        table = None
        if self.positions != "rotary":
            table = self.param("pos_embed", table_init, (1, placed + side * side, self.width))
        if self.registers:
            special.append(self.param("register_tokens", table_init, (1, self.registers, self.width)))
        rows, positions, segments, rotations = [], [], [], []
        for number, images in enumerate(groups):
            _, views, height, width, _ = images.shape
            if height % self.patch_size or width % self.patch_size:
                raise ValueError(f"an image of {height}x{width} px does not divide into patches of {self.patch_size} px")
            grid = (height // self.patch_size, width // self.patch_size)
            tokens = embed(images.reshape(-1, *images.shape[2:]).astype(self.dtype)).reshape(batch * views, -1, self.width)
            if masked is not None and number == 0:
                tokens = jnp.where(masked.masks.reshape(*tokens.shape[:2], 1), masked.token.astype(self.dtype), tokens)
            lead = special
            if table is None:
                rotations.append(rotary(grid, before, self.width // self.num_heads, self.rope_base))
            else:
                patches = (table[0, :placed], resample_positions(table[0, placed:], grid, self.resample_rule))
                positions.append(jnp.concatenate(patches)[None])
                lead = add_positions(special, positions[-1][:, :placed])
            if lead:
                one = jnp.concatenate(lead, axis=1)
                lead = [jnp.broadcast_to(one, (batch * views, *one.shape[1:])).astype(self.dtype)]
            if table is not None:
                tokens = tokens + positions[-1][:, placed:].astype(self.dtype)
            tokens = jnp.concatenate([*lead, tokens], axis=1)
            segments.append((views, tokens.shape[1]))
            rows.append(tokens.reshape(batch, -1, self.width))  # [B * V, T, D] -> [B, V * T, D]
        segments = tuple(segments)
        row = rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)
        if self.pre_norm:
            row = layer_norm(self.dtype, self.layer_norm_eps, "norm_pre")(row)
        row = jax.lax.stop_gradient(row) if self.frozen_blocks else row
        keys = keys if self.drop_path_rate else None
        outputs, attention = self._blocks(row, segments, tuple(rotations) or None, keys, first)
        norm = layer_norm(self.dtype, self.layer_norm_eps, "norm")
        blocks = [split_segments(norm(tokens), segments) for tokens in outputs]
        found: list[Named] = []
        for index in range(len(groups)):
            last = blocks[-1][index]
            found.append({"cls_token": last[:, 0]} if self.class_token else {})
            found[-1] |= {"patch_tokens": last[:, before:], "attention": attention[index]}
            found[-1]["blocks"] = tuple(block[index] for block in blocks)
            if positions:
                found[-1]["positions"] = positions[index]
        return tuple(found)

    def _blocks(
        self, row: Array, segments: Segments, rotations: tuple[Rotation, ...] | None, keys: Array | None, first: int
    ) -> tuple[list[Array], tuple[Array, ...]]:
        """Every block's output [B, R, D], and the attention of the last."""
        block = Block(
            self.num_heads,
            self.mlp_dim,
            self.layer_norm_eps,
            self.dtype,
            self.attention,
            self.layer_scale,
            self.gated_mlp,
            self.activation,
            self.qkv_bias,
            self.product_dtype,
            parent=None,
        )
        # The blocks are functions of their parameters, so that one loop over all of them needs no other parameter tree.
        init = lambda rng: block.init(rng, row[:1], (None, None), segments, rotations)["params"]
        params = [self.param(f"blocks_{index}", init) for index in range(self.depth)]
        params[: self.frozen_blocks] = jax.lax.stop_gradient(params[: self.frozen_blocks])
        rates = drop_path_rates(self.drop_path_rate, self.depth)

        def apply(params: dict, row: Array, number: Array | int, rate: Array | float) -> tuple[Array, tuple[Array, ...]]:
            factors = (None, None)
            if keys is not None:
                factors = tuple(keep_factors(branch, rate, segments, first) for branch in branch_keys(keys, number))
            return block.apply({"params": params}, row, factors, segments, rotations)

        if self.remat != "none":
            apply = jax.checkpoint(apply, policy=remat_policy(self.remat))
        outputs, start = [], 0
        if self.scan_blocks and not self.is_initializing():
            start = self.depth - 1  # the last block's attention is read by name

            def body(row: Array, block: tuple) -> tuple[Array, Array]:
                row, _ = apply(block[0], row, *block[1:])
                return row, row

            # The frozen blocks are a loop of their own, of which there is no backward pass.
            for low, high in itertools.pairwise(sorted({0, min(self.frozen_blocks, start), start})):
                stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params[low:high])
                row, scanned = jax.lax.scan(body, row, (stacked, jnp.arange(low, high), jnp.array(rates[low:high])))
                outputs += list(scanned)
        for index in range(start, self.depth):
            row, attention = apply(params[index], row, index, rates[index])
            outputs.append(row)
        return outputs, attention
