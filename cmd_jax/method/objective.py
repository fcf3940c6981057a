"""The objective of CMD, our reading of the paper (arXiv 2401.08860), and its baselines DINO and EsViT.

Letters: B images, V student views (the first Q = 2 are global, then the local ones), N patches of a view, D backbone width,
d bottleneck width, K prototypes. All terms are means over the batch and over the ordered pairs (q, v) of a teacher view q
and a student view v != q.

    L = w_ii L_I + w_ir L_R + w_is L_S + w_it L_T

    L_I  intra-level, image:   CE( p_t_img[q], p_s_img[v] )
    L_R  intra-level, region:  sum_i w_i CE( p_t_reg[q, m(i)], p_s_reg[v, i] ), m(i) the matching teacher patch, see `regions`
    L_S  inter-level, student: KL( sum_i a_s[v, i] p_s_reg[v, i] || p_s_img[v] )
    L_T  inter-level, teacher: KL( sum_i a_t[q, i] p_t_reg[q, i] || p_t_img[q] ), gradient to the student's scorer alone
L_S and L_T may also be the divergence in the other direction, KL(image || bag).
The variant "released" adds to EsViT's loss the cross-level term of the authors' code, see `released`.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from cmd_jax.method import prototypes as P
from cmd_jax.method import released
from cmd_jax.method.bags import InterDirection
from cmd_jax.method.centers import sinkhorn_center, update_center
from cmd_jax.method.chunks import Streaming
from cmd_jax.method.regions import Places, match_by_location, match_by_similarity
from cmd_jax.method.rows import Centers, Pairing, PrototypePair, StudentRows, TeacherRows, TermWeights

Array = jax.Array
RegionWeights = Literal["teacher_mil", "uniform"]
Centering = Literal["ema", "sinkhorn"]
TEACHER_VIEWS = 2


class Views(NamedTuple):
    """Views of one size, as one network sees them.

    Attributes:
        image_z: [B, V, d] float32, unit norm.
        region_z: [B, V, N, d] float32, unit norm.
        features: [B, V, N, D] backbone embeddings of the patches, compared by cosine where regions match by similarity.
        mil_weights: [B, V, N] float32, sum to 1 over N.
    """

    image_z: Array
    region_z: Array
    features: Array
    mil_weights: Array


class Result(NamedTuple):
    """The loss, its unweighted terms by name, the new centers, and two entropies of the teacher's image level.

    Attributes:
        loss: [] float32, the only part with a gradient.
        terms: [] float32 each.
        centers: after the step.
        teacher_entropy: [B, Q] float32, nats.
        marginal_entropy: [] float32, nats, of the mean distribution of the batch.
    """

    loss: Array
    terms: dict[str, Array]
    centers: Centers
    teacher_entropy: Array
    marginal_entropy: Array


def pair_views(
    group: Views,
    teacher: Views,
    first: int,
    views: int,
    region_weights: RegionWeights,
    places: tuple[Places, Places] | None = None,
) -> Pairing:
    """Pairs every teacher view q with the student's views v != q, and each patch with the teacher's patch that matches it.

    Args:
        group: the student's views of one size.
        teacher: its global views.
        first: place of the group's first view among all of the student's; the teacher's views are the first two.
        views: number of all views of the student.
        region_weights: "teacher_mil" weighs a region by its matched teacher patch, "uniform" is EsViT's mean.
        places: of the group and of the teacher's views: patches match that show one place, and those of places that the
            teacher does not see weigh nothing. None: the most similar patches match.
    """
    batch, count, patches = group.mil_weights.shape
    other = jnp.arange(TEACHER_VIEWS)[:, None] != first + jnp.arange(count)  # [Q, V]
    image_weights = other / (TEACHER_VIEWS * (views - 1))
    if places is None:
        match, seen = match_by_similarity(group.features, teacher.features), True  # [B, Q, V, N]
    else:
        match, seen = match_by_location(*places, patches, teacher.mil_weights.shape[-1])
    if region_weights == "uniform":
        weights = jnp.ones(match.shape)
    else:
        index = match.reshape(batch, TEACHER_VIEWS, -1)
        weights = jnp.take_along_axis(teacher.mil_weights, index, axis=2).reshape(match.shape)
    weights = jnp.where(seen, weights, 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)  # 0 where two views have no place in common
    return jax.lax.stop_gradient(Pairing(image_weights, match, image_weights[..., None] * weights))


def cmd_objective(
    student: tuple[Views, ...],
    student_prototypes: PrototypePair,
    teacher: Views,
    teacher_prototypes: PrototypePair,
    inter_teacher_weights: Array,
    centers: Centers,
    *,
    weights: TermWeights,
    region_weights: RegionWeights,
    student_temp: float,
    teacher_temp: Array | float,
    center_momentum: Array | float,
    centering: Centering = "ema",
    released_mask: bool = True,
    streaming: Streaming | None = None,
    inter_scale: Array | None = None,
    inter_direction: InterDirection = "bag_to_image",
    places: tuple[Places, ...] | None = None,
) -> Result:
    """Computes the loss of one batch and the centers after it.

    Args:
        student: the global views (V = 2) and, if any, the local views, each group of one size.
        student_prototypes: W of the student.
        teacher: the two global views; nothing in it receives gradient.
        teacher_prototypes: W of the teacher, without gradient.
        inter_teacher_weights: [B, 2, N] MIL weights a_t of L_T: the student's scorer on the teacher's embeddings.
        centers: before the step; the teacher's distributions use these.
        weights: of the four terms; a weight of 0 leaves the term out of the program.
        region_weights: "teacher_mil" weighs a region by its matched teacher patch, "uniform" is EsViT's mean.
        student_temp: tau_s.
        teacher_temp: tau_t.
        center_momentum: of the centers' moving average.
        centering: "ema" uses and updates the centers, "sinkhorn" replaces them by those of the batch.
        released_mask: False shows where the released term is NaN as its authors wrote it, see `released.divergence`.
        streaming: how K is passed over; None: in one chunk, float32.
        inter_scale: [] factor of the weights of L_S and L_T at this step; None: 1.
        inter_direction: of L_S and L_T, "bag_to_image" is KL(bag || image), "image_to_bag" KL(image || bag).
        places: where the student's views lie, group by group, the first of them the teacher's too: regions match by location.
            None: by similarity.
    """
    stop = jax.lax.stop_gradient
    teacher, teacher_prototypes, centers = stop(teacher), stop(teacher_prototypes), stop(centers)
    streaming = streaming or Streaming(chunk=student_prototypes.image.shape[0])
    use_regions = any(weights[1:])
    levels = ((teacher.image_z, teacher_prototypes.image), (teacher.region_z, teacher_prototypes.region))
    if centering == "sinkhorn":
        solve = lambda z, rows: sinkhorn_center(z, rows, teacher_temp, streaming)
        centers = Centers(solve(*levels[0]), solve(*levels[1]) if use_regions else centers.region)

    views = sum(group.image_z.shape[1] for group in student)
    firsts = (0, TEACHER_VIEWS)
    of_group = [None] * len(student) if places is None else [(place, places[0]) for place in places]
    pairings = tuple(
        pair_views(group, teacher, first, views, region_weights, place)
        for group, first, place in zip(student, firsts[: len(student)], of_group, strict=True)
    )
    rows = TeacherRows(teacher.image_z, teacher.region_z, teacher_prototypes, centers, jnp.asarray(teacher_temp))
    distilled = P.distil(
        tuple(StudentRows(group.image_z, group.region_z, group.mil_weights) for group in student),
        student_prototypes,
        inter_teacher_weights,
        rows,
        pairings,
        weights=weights,
        student_temp=student_temp,
        streaming=streaming,
        inter_scale=inter_scale,
        inter_direction=inter_direction,
    )
    loss, terms = distilled.loss, distilled.terms
    if weights.released:
        terms = terms | {
            "released": released.term(student, student_prototypes, rows, pairings, student_temp, streaming, released_mask)
        }
        loss += weights.released * terms["released"]
    if centering == "ema":
        update = lambda center, level: update_center(center, *level, center_momentum)
        centers = Centers(
            update(centers.image, levels[0]), update(centers.region, levels[1]) if use_regions else centers.region
        )
    return Result(loss, terms, centers, distilled.teacher_entropy, distilled.marginal_entropy)
