"""The modules on top of the backbone: MIL scorer, projection heads and weight-normalised prototypes."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cmd_jax.method import mil
from cmd_jax.method.logits import l2_normalize
from cmd_jax.models.layers import gelu
from cmd_jax.models.sizes import Scoring

Array = jax.Array
_kernel_init = nn.initializers.lecun_normal()


class MILScorer(nn.Module):
    """Scorer of patches.

    Attributes:
        hidden_dim: M.
        scoring: "gated" (`method.mil.gated_attention_scores`), "attention" (`method.mil.attention_scores`), "class_token"
            (`method.mil.class_token_scores`) or "mean", which scores all patches alike; the last two have no parameters.
        heads: H of "gated" and "attention"; "class_token" has the backbone's, "mean" one.
    """

    hidden_dim: int
    scoring: Scoring = "gated"
    heads: int = 1

    @nn.compact
    def __call__(self, tokens: Array, attention: Array | None = None) -> Array:
        """Scores patches.

        Args:
            tokens: [..., N, D].
            attention: [..., H, T, T] of the backbone's last block; "class_token" alone reads it.

        Returns:
            [..., H, N] float32 scores.
        """
        if self.scoring == "class_token":
            return mil.class_token_scores(attention, tokens.shape[-2])
        if self.scoring == "mean":
            return jnp.zeros((*tokens.shape[:-2], 1, tokens.shape[-2]), jnp.float32)
        gated, shape = self.scoring == "gated", (tokens.shape[-1], self.hidden_dim)
        tanh_kernel = self.param("tanh_kernel", _kernel_init, shape)
        sigmoid_kernel = self.param("sigmoid_kernel", _kernel_init, shape) if gated else None
        # Small, so that training starts from nearly uniform weights.
        out_kernel = self.param("out_kernel", nn.initializers.truncated_normal(0.02), (self.hidden_dim, self.heads))
        tokens = tokens.astype(jnp.float32)
        if gated:
            return mil.gated_attention_scores(tokens, tanh_kernel, sigmoid_kernel, out_kernel)
        return mil.attention_scores(tokens, tanh_kernel, out_kernel)


class BatchStatisticsNorm(nn.Module):
    """Batch normalisation with the statistics of the batch at hand, never running ones: heads serve training alone.

    It takes out what all images share, which a small network starts with and the centers would need long to follow.

    Attributes:
        batch_axis: of a mesh, inside of a `shard_map` that splits the batch along it; None: the batch is whole.
    """

    batch_axis: str | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [..., C]; statistics run over all leading axes, in float32 and over all devices."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        axes = tuple(range(x.ndim - 1))
        full = x.astype(jnp.float32)
        mean, variance = jnp.mean(full, axis=axes), jnp.var(full, axis=axes)
        if self.batch_axis:  # those of equal parts, put together
            of_part, mean = mean, jax.lax.pmean(mean, self.batch_axis)
            variance = jax.lax.pmean(variance + jnp.square(of_part - mean), self.batch_axis)
        normal = (full - mean) * jax.lax.rsqrt(variance + 1e-5)
        return (normal * scale + bias).astype(x.dtype)


class ProjectionHead(nn.Module):
    """MLP with erf-GELU to an l2-normalised bottleneck (DINO's head without its last layer).

    Attributes:
        hidden_dim: width of the hidden layers.
        bottleneck_dim: d.
        layers: number of linear layers.
        batch_norm: batch statistics after each hidden layer (an option of DINO's head).
        dtype: of the products; the normalisation is float32.
        batch_axis: see `BatchStatisticsNorm`.
    """

    hidden_dim: int
    bottleneck_dim: int
    layers: int = 3
    batch_norm: bool = False
    dtype: jnp.dtype = jnp.float32
    batch_axis: str | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [..., D] -> z [..., d] float32 of unit norm."""
        for index in range(self.layers):
            last = index == self.layers - 1
            features = self.bottleneck_dim if last else self.hidden_dim
            x = nn.Dense(features, dtype=self.dtype, kernel_init=_kernel_init, name=f"mlp_{index}")(x)
            if not last:
                if self.batch_norm:
                    x = BatchStatisticsNorm(self.batch_axis, name=f"norm_{index}")(x)
                x = gelu(x)
        return l2_normalize(x)


class Prototypes(nn.Module):
    """Weight-normalised last layer: row k is weight_g[k] * weight_v[k] / |weight_v[k]|.

    Attributes:
        count: K.
        bottleneck_dim: d.
        learned_gain: False keeps every row at unit norm (`norm_last_layer`).
    """

    count: int
    bottleneck_dim: int
    learned_gain: bool = False

    @nn.compact
    def __call__(self) -> Array:
        """Returns W, [K, d] float32; logits are z @ W.T."""
        rows = self.param("weight_v", nn.initializers.lecun_normal(in_axis=1, out_axis=0), (self.count, self.bottleneck_dim))
        rows = l2_normalize(rows)
        if self.learned_gain:
            rows = rows * self.param("weight_g", nn.initializers.ones, (self.count, 1))
        return rows
