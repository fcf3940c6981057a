"""Layers that the backbones share: norm, MLP, self-attention, stochastic depth, initial values.

Letters: B images (or windows), T tokens, D width, H heads.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from cmd_jax.models.sizes import Activation, QKVBias

Array = jax.Array
Attention = Literal["xla", "cudnn"]
Remat = Literal["none", "dots", "full"]
Segments = tuple[tuple[int, int], ...]  # (V sequences, of T tokens each) that lie side by side in a row of tokens
Rotation = tuple[Array, Array]  # cosines and sines that rotate the tokens of a sequence, [1, T, 1, D/H / 2] float32 each

# 1/sqrt(fan_in). DINO's fixed 0.02 is about that for widths of 384 and up, but leaves the small sizes almost linear.
kernel_init = nn.initializers.lecun_normal()
table_init = nn.initializers.truncated_normal(0.02)


def remat_policy(remat: Remat) -> Callable | None:
    """What a rematerialised block may keep: products with weights ("dots"), nothing but its input ("full").

    Attention logits are products of activations, quadratic in the tokens, and are never kept.
    """
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None


def layer_norm(dtype: jnp.dtype, eps: float, name: str) -> nn.LayerNorm:
    """LayerNorm; flax computes its statistics in float32."""
    return nn.LayerNorm(epsilon=eps, use_fast_variance=False, dtype=dtype, name=name)


def patch_embedding(width: int, patch_px: int, dtype: jnp.dtype, use_bias: bool = True) -> nn.Conv:
    """Linear map of each patch_px x patch_px square of pixels; pixels beyond the last whole square are not read."""
    size = {"kernel_size": (patch_px, patch_px), "strides": (patch_px, patch_px), "padding": "VALID"}
    return nn.Conv(width, **size, use_bias=use_bias, dtype=dtype, kernel_init=kernel_init, name="patch_embed")


class Masked(NamedTuple):
    """Patches whose embedding, without its position, is replaced by a learned token.

    Attributes:
        masks: [B, V, N] bool, of the patches of the backbone's output.
        token: [1, 1, D] float32, of the width of the patch embedding.
    """

    masks: Array
    token: Array


def attend(q: Array, k: Array, v: Array, bias: Array | None, implementation: Attention) -> tuple[Array, Array]:
    """Attention of one sequence a row.

    Args:
        q, k, v: [B, T, H, D/H].
        bias: added to the logits; [B, H, T, T] or what broadcasts to it.
        implementation: "xla", or "cudnn" for the fused kernel of NVIDIA GPUs, where the program must then run. It takes no
            float32 and here no bias: those are computed by XLA in any case.

    Returns:
        [B, T, H, D/H] and the attention probabilities [B, H, T, T] float32.
    """
    scale = q.shape[-1] ** -0.5
    # Heads first: a head's rows then lie together in all four products of forward and backward pass.
    q_heads, k_heads, v_heads = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    logits = jnp.einsum("bhqd,bhkd->bhqk", q_heads, k_heads, preferred_element_type=jnp.float32) * scale
    attention = jax.nn.softmax(logits if bias is None else logits + bias, axis=-1)
    if implementation == "cudnn" and bias is None and q.dtype != jnp.float32:
        # The probabilities above are left out of the program unless a caller reads them.
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn"), attention
    return jnp.swapaxes(jnp.einsum("bhqk,bhkd->bhqd", attention.astype(v.dtype), v_heads), 1, 2), attention


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rounded_product(x: Array, kernel: Array, operand_dtype: jnp.dtype) -> Array:
    """x @ kernel, and the products of its gradients, with operands rounded to `operand_dtype` and sums in the dtype of x.

    Args:
        x: [..., D].
        kernel: [D, F], of the dtype of x.
        operand_dtype: narrower than that of x.

    Returns:
        [..., F] in the dtype of x.
    """
    return _rounded_product(x, kernel, operand_dtype)[0]


def _rounded_product(x: Array, kernel: Array, operand_dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array, Array]]:
    rounded = x.astype(operand_dtype), kernel.astype(operand_dtype)
    product = jnp.einsum("...d,df->...f", *rounded, preferred_element_type=x.dtype)
    return product, (*rounded, jnp.zeros((), x.dtype))


def _rounded_gradients(operand_dtype: jnp.dtype, kept: tuple[Array, Array, Array], slope: Array) -> tuple[Array, Array]:
    x, kernel, of_dtype = kept
    slope, result = slope.astype(operand_dtype), {"preferred_element_type": of_dtype.dtype}
    return jnp.einsum("...f,df->...d", slope, kernel, **result), jnp.einsum("...d,...f->df", x, slope, **result)


rounded_product.defvjp(_rounded_product, _rounded_gradients)


def product_of(dtype: jnp.dtype, product_dtype: jnp.dtype | None) -> Callable | None:
    """`dot_general` of a linear layer whose activations are of `dtype`; None is jax.lax's."""
    if product_dtype is None or jnp.dtype(product_dtype) == jnp.dtype(dtype):
        return None
    return lambda x, kernel, *_, **__: rounded_product(x, kernel, jnp.dtype(product_dtype))


class PackedLinear(nn.Module):
    """Queries, keys and values of tokens by one linear layer.

    Attributes:
        bias: which of the three have one. With "qv" the parameter is that of all three, and the keys' part is neither read nor
            trained (DINOv3).
        dtype: of the result.
        product_dtype: of the product's operands; None: `dtype`.
    """

    bias: QKVBias = "qkv"
    dtype: jnp.dtype = jnp.float32
    product_dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """[..., D] -> [..., 3D]."""
        width = tokens.shape[-1]
        kernel, bias = self.param("kernel", kernel_init, (width, 3 * width)), None
        if self.bias != "none":
            bias = self.param("bias", nn.initializers.zeros, (3 * width,))
        if self.bias == "qv":
            bias = jnp.where(np.repeat([True, False, True], width), bias, 0.0)
        tokens, kernel, bias = promote_dtype(tokens, kernel, bias, dtype=self.dtype)
        product = product_of(self.dtype, self.product_dtype)
        packed = tokens @ kernel if product is None else product(tokens, kernel)
        return packed if bias is None else packed + bias.reshape((1,) * (packed.ndim - 1) + (-1,))


def rotate(x: Array, rotation: Rotation) -> Array:
    """Rotates each pair of channels (i, i + D/H / 2) of [B, T, H, D/H] by its token's angles; computed in float32."""
    cosine, sine = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)


def self_attention(
    tokens: Array,
    num_heads: int,
    dtype: jnp.dtype,
    bias: Array | None = None,
    segments: Segments | None = None,
    implementation: Attention = "xla",
    qkv_bias: QKVBias = "qkv",
    rotations: tuple[Rotation, ...] | None = None,
    product_dtype: jnp.dtype | None = None,
) -> tuple[Array, tuple[Array, ...]]:
    """Multi-head self-attention with packed q, k, v; called inside a compact method, whose module gets `qkv` and `proj`.

    Args:
        tokens: [B, R, D].
        num_heads: H.
        dtype: of activations and products; the softmax is float32.
        bias: added to the logits, see `attend`.
        segments: the sequences that lie side by side in a row; None: the row is one.
        implementation: see `attend`.
        qkv_bias: see `PackedLinear`.
        rotations: of queries and keys, one for each segment; None: positions are in the tokens.
        product_dtype: of the operands of the linear layers; None: `dtype`.

    Returns:
        [B, R, D] and for each segment of V sequences the attention probabilities [B * V, H, T, T] float32.
    """
    batch, length, width = tokens.shape
    packed = PackedLinear(qkv_bias, dtype, product_dtype, name="qkv")(tokens)
    packed = packed.reshape(batch, length, 3, num_heads, -1)
    mixed, attention = [], []
    for index, part in enumerate(split_segments(packed, segments or ((1, length),))):  # [B * V, T, 3, H, D/H]
        q, k, v = part[:, :, 0], part[:, :, 1], part[:, :, 2]
        if rotations is not None:
            q, k = rotate(q, rotations[index]), rotate(k, rotations[index])
        out, probs = attend(q, k, v, bias, implementation)
        mixed.append(out.reshape(batch, -1, width))
        attention.append(probs)
    mixed = mixed[0] if len(mixed) == 1 else jnp.concatenate(mixed, axis=1)
    project = nn.Dense(width, dtype=dtype, kernel_init=kernel_init, dot_general=product_of(dtype, product_dtype), name="proj")
    return project(mixed), tuple(attention)


def split_segments(rows: Array, segments: Segments) -> list[Array]:
    """[B, R, ...] -> for each segment of V sequences of T tokens [B * V, T, ...]."""
    batch, parts, start = rows.shape[0], [], 0
    for views, length in segments:
        part = rows[:, start : start + views * length]
        parts.append(part.reshape(batch * views, length, *rows.shape[2:]))
        start += views * length
    return parts


def gelu(x: Array) -> Array:
    """Exact GELU, x (1 + erf(x / sqrt 2)) / 2 in the dtype of x; jax.nn's exact form takes erfc, which has more branches."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), OpenAI's stand-in for GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
    "silu": jax.nn.silu,
}


class MLP(nn.Module):
    """Two linear layers with an activation between them.

    Attributes:
        hidden: width between the layers.
        dtype: of activations and products.
        activation: of the hidden units.
        gated: the activation is that of a third layer, `gate`, whose output multiplies the first's (SwiGLU with silu).
        product_dtype: of the products' operands; None: `dtype`.
    """

    hidden: int
    dtype: jnp.dtype = jnp.float32
    activation: Activation = "gelu"
    gated: bool = False
    product_dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        options = {"kernel_init": kernel_init, "dot_general": product_of(self.dtype, self.product_dtype)}
        linear = lambda width, name: nn.Dense(width, dtype=self.dtype, name=name, **options)
        activate = ACTIVATIONS[self.activation]
        hidden = linear(self.hidden, "fc1")(x)
        hidden = activate(linear(self.hidden, "gate")(x)) * hidden if self.gated else activate(hidden)
        return linear(x.shape[-1], "fc2")(hidden)


def keep_factors(keys: Array, rate: Array | float, segments: Segments, first: int) -> Array:
    """Factors of stochastic depth, one for each sequence: 0 with probability `rate`, else 1 / (1 - rate).

    Args:
        keys: [B] random keys of the branch, one for each image: what an image draws does not depend on its row.
        rate: probability in 0..1.
        segments: the sequences side by side in a row.
        first: number of the first segment among all that share the key, so that segments on their own draw the same.

    Returns:
        [B, R, 1] float32.
    """
    factors = []
    for number, (views, length) in enumerate(segments, first):
        of_segment = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
        keep = jax.vmap(functools.partial(jax.random.bernoulli, p=1.0 - rate, shape=(views,)))(of_segment)
        factors.append(jnp.repeat(keep / (1.0 - rate), length, axis=1))
    return jnp.concatenate(factors, axis=1)[..., None]


def branch_keys(keys: Array, block: Array | int) -> tuple[Array, Array]:
    """Random keys of stochastic depth for both residual branches of a block, from those of the images: [B] -> two of [B]."""
    split = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, block)))(keys)
    return split[:, 0], split[:, 1]


def drop_path(branch: Array, factors: Array | None) -> Array:
    """Stochastic depth: a residual branch times what `keep_factors` drew; None (the teacher, evaluation) keeps it whole."""
    return branch if factors is None else (branch * factors).astype(branch.dtype)


def drop_path_rates(rate: float, depth: int) -> tuple[float, ...]:
    """Rates of `depth` blocks in order: linearly from 0 at the first to `rate` at the last."""
    return tuple(rate * index / max(1, depth - 1) for index in range(depth))


def pre_norm_block(
    tokens: Array,
    mix: Callable[[Array], tuple[Array, Any]],
    feed: Callable[[Array], Array],
    factors: tuple,
    eps: float,
    dtype: jnp.dtype,
) -> tuple[Array, Any]:
    """x + mix(norm(x)), then x + feed(norm(x)); called inside a compact method, whose module gets `norm1` and `norm2`.

    Args:
        tokens: [B, ..., D].
        mix: attention, tokens -> (tokens, attention probabilities).
        feed: the MLP, tokens -> tokens.
        factors: of stochastic depth for both branches, or two None.
        eps: of the norms.
        dtype: of activations.

    Returns:
        [B, ..., D] and the attention probabilities.
    """
    mixed, attention = mix(layer_norm(dtype, eps, "norm1")(tokens))
    tokens = tokens + drop_path(mixed, factors[0])
    return tokens + drop_path(feed(layer_norm(dtype, eps, "norm2")(tokens)), factors[1]), attention
