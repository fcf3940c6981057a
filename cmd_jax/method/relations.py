"""Relations: which training images an image resembles, distilled from the teacher's embeddings (L_N).

A memory bank holds the teacher's last embeddings of every training image: of the whole and of its centre, neither augmented.
What an image resembles among the others is a distribution over the bank, as in ReSSL (arXiv 2107.09282), but over the images
themselves, without a head or prototypes: so the term is sharp from the first steps on pretrained weights, where new heads know
nothing yet. Each look has neighbours of its own. As far as the looks agree on them they are the target: they may be of the
image's class and on another background. The rest of the target is the image itself (instance discrimination, arXiv 1805.01978).
The student tells all that from a single augmented view.

Letters: B images, V student views, L looks at an image, F width of the embedding, M rows of the bank, one for a training image.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cmd_jax.method.logits import l2_normalize
from cmd_jax.method.products import product

Array = jax.Array
NOT_SEEN = -1e9  # logit of rows that hold no embedding yet
OTHER_POOLS = 0.7  # norm of the pools after the first: their cosines count half as much as its


class Relations(NamedTuple):
    """What L_N reads beside the embeddings of a batch.

    Attributes:
        bank: [M, L, F], rows of `scaled_pools`, 0 where an image was not seen yet; those of the batch are written.
        index: [B] int32, the images' rows.
        widths: of the pools that an embedding joins, F together.
        teacher_temp: of the teacher's softmax over the other images.
        student_temp: of the student's softmax over all images.
    """

    bank: Array
    index: Array
    widths: tuple[int, ...]
    teacher_temp: float
    student_temp: float


def scaled_pools(embedding: Array, widths: tuple[int, ...]) -> Array:
    """Joined pools, [..., F], each of a fixed norm, so that the widest does not decide alone: 1 of the first, then OTHER_POOLS.

    Args:
        embedding: the pools one after the other.
        widths: of the pools, F together.

    Returns:
        [..., F] float32.
    """
    ends = [sum(widths[: number + 1]) for number in range(len(widths) - 1)]
    first, *others = (l2_normalize(part) for part in jnp.split(embedding, ends, axis=-1))
    return jnp.concatenate([first, *(OTHER_POOLS * part for part in others)], axis=-1)


def write_rows(bank: Array, index: Array, rows: Array) -> Array:
    """The bank [M, L, F] with the rows [B, L, F] of the images [B] in place of their old ones, where those are finite."""
    finite = jnp.all(jnp.isfinite(rows), axis=(1, 2))
    written = jax.nn.one_hot(index, bank.shape[0]) * finite[:, None]  # not a scatter, whose order is not fixed on a GPU
    new = product("bm,blf->mlf", written, jnp.where(finite[:, None, None], rows, 0.0))
    return jnp.where(jnp.any(written > 0, axis=0)[:, None, None], new, bank)


def relation_term(student: Array, relations: Relations) -> Array:
    """L_N: CE(r_t, r_s[v]), mean over the batch and the student's views.

    Embeddings are compared by cosine around the bank's mean. The student's relation is r_s = softmax(cos / student_temp) over
    the means of the rows' looks. The teacher's is, for another image, the least over the looks of softmax(cos / teacher_temp)
    over the others, and what is left of 1 for the image itself. Rows that hold no embedding yet take no part.

    Args:
        student: [B, V, F] embeddings, the only part with a gradient.
        relations: the bank, the images' rows in it, and how they are compared.

    Returns:
        [] float32, nats.
    """
    bank, index, widths, teacher_temp, student_temp = relations
    bank = jax.lax.stop_gradient(bank)
    seen = jnp.any(bank != 0, axis=(1, 2))  # [M]
    mean = jnp.sum(bank, axis=0) / jnp.maximum(jnp.sum(seen), 1)  # [L, F]
    looks = l2_normalize(bank - mean)
    of_teacher = product("blf,mlf->blm", looks[index], looks)
    mean_look = jnp.mean(mean, axis=0)
    rows = l2_normalize(jnp.mean(bank, axis=1) - mean_look)
    of_student = product("bvf,mf->bvm", l2_normalize(scaled_pools(student, widths) - mean_look), rows)

    own = jax.nn.one_hot(index, bank.shape[0])  # [B, M]
    others = (seen & (own == 0))[:, None]  # [B, 1, M]
    of_others = jnp.where(others, of_teacher / teacher_temp, NOT_SEEN)
    agreed = jnp.min(jnp.where(others, jax.nn.softmax(of_others, axis=-1), 0.0), axis=1)
    target = agreed + own * (1.0 - jnp.sum(agreed, axis=-1, keepdims=True))
    relation = jax.nn.log_softmax(jnp.where(seen, of_student / student_temp, NOT_SEEN), axis=-1)
    return -jnp.mean(product("bm,bvm->bv", target, jnp.where(seen, relation, 0.0)))
