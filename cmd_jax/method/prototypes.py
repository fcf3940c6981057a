"""Distributions over K prototypes, written on bottlenecks z and prototype rows W so that callers never hold logits.

Logits are z @ W.T, so a cross-entropy against a fixed target p needs of p only the d-vector M = sum_k p_k W[k]:

    CE(p, softmax(s)) = logsumexp(s) - z . M / temp,   s = W z / temp.

Everything is float32. Letters: K prototypes, d bottleneck width, N patches, V views, Q teacher views.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def student_logits(z: Array, prototypes: Array, temp: float) -> Array:
    """W z / temp: [..., d] -> [..., K] float32."""
    return jnp.einsum("...d,kd->...k", z, prototypes, preferred_element_type=jnp.float32) / temp


def teacher_logits(z: Array, prototypes: Array, center: Array, temp: Array | float) -> Array:
    """(W z - center) / temp: [..., d] -> [..., K] float32."""
    return (jnp.einsum("...d,kd->...k", z, prototypes, preferred_element_type=jnp.float32) - center) / temp


def expected_prototype(probs: Array, prototypes: Array) -> Array:
    """M = sum_k p_k W[k]: [..., K] probabilities, [K, d] -> [..., d]."""
    return jnp.einsum("...k,kd->...d", probs, prototypes, preferred_element_type=jnp.float32)


def mixture_divergence(weights: Array, region_logits: Array, image_logits: Array) -> Array:
    """KL( sum_i a_i softmax(r_i) || softmax(x) ) of a bag's regions from its image.

    Args:
        weights: [..., N], sum to 1 over N.
        region_logits: [..., N, K].
        image_logits: [..., K].

    Returns:
        [...] float32, not negative up to rounding.
    """
    # log of the mixture by a log-sum-exp over patches, so that a prototype no patch uses gives a finite value.
    log_regions = jax.nn.log_softmax(region_logits, axis=-1)
    log_mixture = jax.nn.logsumexp(log_regions, axis=-2, b=weights[..., None])
    return jnp.sum(jnp.exp(log_mixture) * (log_mixture - jax.nn.log_softmax(image_logits, axis=-1)), axis=-1)
