"""Divergence between a bag and its image over a chunk of the prototypes, in both directions, and its slopes.

Letters: N patches of a view, k prototypes of a chunk; sigma_i are the patches' distributions, a_i their weights,
pi = sum_i a_i sigma_i the mixture, q the image's distribution. What the sums D and T_i add up to, and the gradients they are
for, stands in `streamed`.
"""

import jax
import jax.numpy as jnp

from cmd_jax.method.products import product
from cmd_jax.method.types import InterDirection

Array = jax.Array


def sums(direction: InterDirection, weights: Array, log_regions: Array, log_image: Array) -> tuple[Array, Array]:
    """A chunk's part of D and of the slopes T_i.

    Args:
        direction: of the divergence.
        weights: [..., N], a.
        log_regions: [..., N, k], log sigma.
        log_image: [..., k], log q.

    Returns:
        [...] and [..., N].
    """
    if direction == "bag_to_image":
        probs = jnp.exp(log_regions)
        mixture, t = mixture_slope(weights, probs, log_image)
        return jnp.sum(mixture * (t - 1.0), axis=-1), product("...nk,...k->...n", probs, t)
    shares, ratio, log_ratio = _shares(weights, log_regions, log_image)
    slopes = -product("...nk,...k->...n", shares, ratio)
    return jnp.sum(jnp.exp(log_image) * log_ratio, axis=-1), slopes


def mixture_slope(weights: Array, probs: Array, log_image: Array) -> tuple[Array, Array]:
    """(pi, t) of KL(bag || image): [..., N], [..., N, k] probabilities, [..., k] log-probabilities -> [..., k] each."""
    mixture = product("...n,...nk->...k", weights, probs)
    # A prototype that no patch uses counts 0: its probability underflows, its logarithm must stay finite.
    log_mixture = jnp.log(jnp.maximum(mixture, jnp.finfo(mixture.dtype).tiny))
    return mixture, log_mixture - log_image + 1.0


def reverse_slopes(
    weights: Array, log_regions: Array, log_image: Array, divergence: Array, slopes: Array
) -> tuple[Array, Array]:
    """Slopes of KL(image || bag) for the logits: dD/dx_k, and dD/ds_ik over a_i.

    Args:
        weights: [..., N], a.
        log_regions: [..., N, k], log sigma.
        log_image: [..., k], log q.
        divergence: [...], D.
        slopes: [..., N], T.

    Returns:
        [..., k] and [..., N, k].
    """
    shares, ratio, log_ratio = _shares(weights, log_regions, log_image)
    of_image = jnp.exp(log_image) * (log_ratio - divergence[..., None])
    return of_image, -(shares * ratio[..., None, :] + jnp.exp(log_regions) * slopes[..., None])


def _shares(weights: Array, log_regions: Array, log_image: Array) -> tuple[Array, Array, Array]:
    """(e, v, u) with sigma_ik q_k / pi_k = e_ik v_k and u = log q - log pi: [..., N, k], [..., k], [..., k].

    q / pi overflows where no patch uses a prototype that the image uses. Relative to the patch that uses it most nothing does:
    e_ik = sigma_ik / max_j sigma_jk is at most 1, and its mean under a at least the weight of that patch.
    """
    peak = jnp.max(log_regions, axis=-2)
    shares = jnp.exp(log_regions - peak[..., None, :])
    mean = product("...n,...nk->...k", weights, shares)
    mean = jnp.maximum(mean, jnp.finfo(mean.dtype).tiny)
    return shares, jnp.exp(log_image) / mean, log_image - peak - jnp.log(mean)
