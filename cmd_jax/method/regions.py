"""Matching of the student's patches with the teacher's for L_R.

Letters: B images, V student views of one size, Q = 2 teacher views, N patches of a student view, M of a teacher view, D
backbone width. Patches form a square grid, row-major.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cmd_jax.method.products import product

Array = jax.Array


class Places(NamedTuple):
    """Where views of one size lie in their images.

    Attributes:
        box: [B, V, 4] (top, left, height, width) in pixels of the image.
        flip: [B, V] bool, whether the view is mirrored.
        patch_side: of a patch, a fraction of the view's side; the last row and column may reach beyond the view.
    """

    box: Array
    flip: Array
    patch_side: float


def match_by_similarity(student: Array, teacher: Array) -> Array:
    """argmax_j cosine(student patch i, teacher patch j), for every pair of views (EsViT, arXiv 2106.09785, L_R).

    Args:
        student: [B, V, N, D].
        teacher: [B, Q, M, D].

    Returns:
        [B, Q, V, N] int32 indices into the teacher's M patches.
    """

    def unit(x: Array) -> Array:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-16))

    similarity = product("bvnd,bqmd->bqvnm", unit(student), unit(teacher))
    return jnp.argmax(similarity, axis=-1)


def match_by_location(student: Places, teacher: Places, patches: int, teacher_patches: int) -> tuple[Array, Array]:
    """The teacher's patch that holds the centre of the student's, for every pair of views (as VICRegL, arXiv 2210.01571).

    Args:
        student: V views.
        teacher: Q views of the same images.
        patches: N, of a student view.
        teacher_patches: M, of a teacher view.

    Returns:
        [B, Q, V, N] int32 indices into the teacher's M patches, and [B, Q, V, N] bool, whether the teacher's view holds the
        centre; the index is that of the nearest patch where it does not.
    """
    side, teacher_side = math.isqrt(patches), math.isqrt(teacher_patches)
    mirrored = lambda x, flip: jnp.where(flip, 1 - x, x)
    # The last row and column show what lies before the edge.
    center = jnp.minimum((jnp.arange(side) + 0.5) * student.patch_side, 1.0)
    y, x = jnp.repeat(center, side), jnp.tile(center, side)  # [N], fractions of the view
    top, left, height, width = jnp.moveaxis(student.box[..., None], -2, 0)  # [B, V, 1]
    y, x = top + y * height, left + mirrored(x, student.flip[..., None]) * width  # [B, V, N], pixels

    top, left, height, width = jnp.moveaxis(teacher.box[:, :, None, None], -1, 0)  # [B, Q, 1, 1]
    y = (y[:, None] - top) / height  # [B, Q, V, N], fractions of the teacher's view
    x = mirrored((x[:, None] - left) / width, teacher.flip[:, :, None, None])
    seen = (y >= 0) & (y <= 1) & (x >= 0) & (x <= 1)
    cell = lambda place: jnp.clip(jnp.floor(place / teacher.patch_side).astype(jnp.int32), 0, teacher_side - 1)
    return cell(y) * teacher_side + cell(x), seen
