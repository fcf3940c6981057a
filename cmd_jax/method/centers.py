"""Centers of the teacher's logits (DINO, arXiv 2104.14294, equation 4), kept apart for the image and the region level."""

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
