"""Centers of the teacher's logits, kept apart for the image and the region level.

DINO's is a moving average (arXiv 2104.14294, equation 4). Sinkhorn-Knopp (SwAV, arXiv 2006.09882; DINOv2) solves for the center
on the batch at hand instead.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def update_center(center: Array, teacher_z: Array, teacher_prototypes: Array, momentum: float) -> Array:
    """center * momentum + mean(teacher logits) * (1 - momentum).

    Logits are linear in z, so their mean is one product with the mean of z: [d] is reduced over devices instead of [K].

    Args:
        center: [K] float32.
        teacher_z: [..., d] float32 bottlenecks; the mean runs over all leading axes.
        teacher_prototypes: [K, d] float32.
        momentum: in 0..1.
    """
    mean_z = jnp.mean(teacher_z.astype(jnp.float32), axis=tuple(range(teacher_z.ndim - 1)))
    return center * momentum + (teacher_prototypes @ mean_z) * (1.0 - momentum)


def sinkhorn_center(teacher_z: Array, teacher_prototypes: Array, temp: Array | float, iterations: int = 3) -> Array:
    """The center with which softmax((W z - center) / temp) gives every prototype the same share of the batch.

    Sinkhorn-Knopp scales the rows and columns of exp(W z / temp) in turn; the columns' scales are a center, so the
    teacher's distributions keep their form.

    Args:
        teacher_z: [..., d] float32 bottlenecks; all leading axes are the batch.
        teacher_prototypes: [K, d] float32.
        temp: of the teacher.
        iterations: of the scaling; SwAV and DINOv2 use 3.

    Returns:
        [K] float32.
    """
    z = teacher_z.reshape(-1, teacher_z.shape[-1])
    logits = jnp.einsum("nd,kd->nk", z, teacher_prototypes, preferred_element_type=jnp.float32) / temp
    share = jnp.log(logits.shape[0] / logits.shape[1])
    scaled = jnp.zeros(logits.shape[1])
    for _ in range(iterations):
        normalizer = jax.nn.logsumexp(logits - scaled, axis=1, keepdims=True)
        scaled = jax.nn.logsumexp(logits - normalizer, axis=0) - share
    return temp * scaled
