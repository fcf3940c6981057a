"""Divergence between a bag and its image over a chunk of the prototypes, and its slopes.

Letters: N patches of a view, k prototypes of a chunk; sigma_i are the patches' distributions, a_i their weights,
pi = sum_i a_i sigma_i the mixture, q the image's distribution. What the sums D and T_i add up to, and the gradients they are
for, stands in `streamed`.
"""

import jax
import jax.numpy as jnp

from cmd_jax.method.products import product

Array = jax.Array


def sums(weights: Array, log_regions: Array, log_image: Array) -> tuple[Array, Array]:
    """A chunk's part of D and of the slopes T_i.

    Args:
        weights: [..., N], a.
        log_regions: [..., N, k], log sigma.
        log_image: [..., k], log q.

    Returns:
        [...] and [..., N].
    """
    probs = jnp.exp(log_regions)
    mixture, t = mixture_slope(weights, probs, log_image)
    return jnp.sum(mixture * (t - 1.0), axis=-1), product("...nk,...k->...n", probs, t)


def mixture_slope(weights: Array, probs: Array, log_image: Array) -> tuple[Array, Array]:
    """(pi, t) of KL(bag || image): [..., N], [..., N, k] probabilities, [..., k] log-probabilities -> [..., k] each."""
    mixture = product("...n,...nk->...k", weights, probs)
    # A prototype that no patch uses counts 0: its probability underflows, its logarithm must stay finite.
    log_mixture = jnp.log(jnp.maximum(mixture, jnp.finfo(mixture.dtype).tiny))
    return mixture, log_mixture - log_image + 1.0
