"""Centers of the teacher's logits, kept apart for the image and the region level.

DINO's is a moving average (arXiv 2104.14294, equation 4). Sinkhorn-Knopp (SwAV, arXiv 2006.09882; DINOv2) solves for the center
on the batch at hand instead.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from cmd_jax.method.chunks import DATA, Normalizer, Streaming, for_chunks, put_chunk, take_chunk
from cmd_jax.method.products import product

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
    return center * momentum + product("kd,d->k", teacher_prototypes, mean_z) * (1.0 - momentum)


def sinkhorn_center(
    teacher_z: Array, teacher_prototypes: Array, temp: Array | float, streaming: Streaming, iterations: int = 3
) -> Array:
    """The center with which softmax((W z - center) / temp) gives every prototype the same share of the batch.

    Sinkhorn-Knopp scales the rows and columns of exp(W z / temp) in turn; the columns' scales are a center, so the
    teacher's distributions keep their form. The matrix is recomputed chunk by chunk, once more than there are iterations.

    Args:
        teacher_z: [..., d] float32 bottlenecks; all leading axes are the batch.
        teacher_prototypes: [K, d] float32.
        temp: of the teacher.
        streaming: chunk, dtype and mesh.
        iterations: of the scaling; SwAV and DINOv2 use 3.

    Returns:
        [K] float32.
    """
    z = teacher_z.reshape(-1, teacher_z.shape[-1]) / temp
    images, alike = PartitionSpec(DATA), PartitionSpec()
    solve = lambda z, prototypes: _scales(z, prototypes, streaming, iterations)
    return temp * streaming.on_mesh(solve, (images, alike), alike)(z, teacher_prototypes)


def _scales(z: Array, prototypes: Array, streaming: Streaming, iterations: int) -> Array:
    """Logarithms of the columns' scales of exp(W z): [n, d] of a device, [K, d] -> [K]."""
    count, empty = prototypes.shape[0], Normalizer.start(z.shape[:1], jnp.float32)
    share = jnp.log(streaming.total(z.shape[0]) / count)

    def logits(start: Array | int, size: int) -> Array:
        return product("nd,kd->nk", z, take_chunk(prototypes, start, size), streaming.dtype)

    normalizer = for_chunks(count, streaming.chunk, lambda state, *at: state.add(logits(*at)), empty)
    scaled = jnp.zeros(count, jnp.float32)
    for _ in range(iterations):
        of_rows = normalizer.finish()[:, None]

        def scale_columns(carry: tuple[Array, Normalizer], start: Array | int, size: int, of_rows: Array = of_rows):
            scaled, normalizer = carry
            of_chunk = logits(start, size)
            part = _log_sum_exp_of_images(of_chunk - of_rows, streaming) - share
            # the next iteration's normalizers of the rows, while the chunk is at hand
            return put_chunk(scaled, part, start), normalizer.add(of_chunk - part)

        scaled, normalizer = for_chunks(count, streaming.chunk, scale_columns, (scaled, empty))
    return scaled


def _log_sum_exp_of_images(x: Array, streaming: Streaming) -> Array:
    """[n, k] -> [k] over the rows of all devices."""
    if streaming.devices == 1:
        return jax.nn.logsumexp(x, axis=0)
    largest = lax.pmax(jnp.max(x, axis=0), DATA)
    return largest + jnp.log(lax.psum(jnp.sum(jnp.exp(x - largest), axis=0), DATA))
