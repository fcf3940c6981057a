"""Signs of a sick run: numbers that stop being finite, a teacher that collapses."""

import jax
import jax.numpy as jnp

Array = jax.Array


class NonFinite(RuntimeError):
    """The loss or its gradient stopped being finite."""


def is_finite(loss: Array, grad_norm: Array) -> Array:
    """[] bool: whether a step may change the state."""
    return jnp.isfinite(loss) & jnp.isfinite(grad_norm)


def relative_entropy(entropy: Array, prototypes: int) -> Array:
    """Mean entropy of the teacher's distributions over log K: 1 is uniform (collapse), 0 one-hot.

    Args:
        entropy: [...] nats.
        prototypes: K.
    """
    return jnp.mean(entropy) / jnp.log(prototypes)


def feature_std(embedding: Array) -> Array:
    """Standard deviation over the batch of l2-normalised features, times sqrt(D): 1 is isotropic, 0 constant (collapse).

    Args:
        embedding: [B, D].
    """
    unit = embedding / jnp.maximum(jnp.linalg.norm(embedding, axis=-1, keepdims=True), 1e-12)
    return jnp.mean(jnp.std(unit, axis=0)) * jnp.sqrt(embedding.shape[-1])


def mil_entropy(weights: Array) -> Array:
    """Mean entropy of the MIL weights over log N: 1 is uniform, 0 a single patch.

    Args:
        weights: [..., N], sum to 1.
    """
    entropy = -jnp.sum(jax.scipy.special.xlogy(weights, weights), axis=-1)
    return jnp.mean(entropy) / jnp.log(weights.shape[-1])
