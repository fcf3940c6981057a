"""The objective of CMD, our reading of the paper (arXiv 2401.08860), and its baselines DINO, EsViT and iBOT.

Letters: B images, V student views (the first Q = 2 are global, then the local ones), N patches of a view, D backbone width,
d bottleneck width, K prototypes. All terms are means over the batch and over the ordered pairs (q, v) of a teacher view q
and a student view v != q.

    L = w_ii L_I + w_ir L_R + w_is L_S + w_it L_T + w_n L_N  (+ masked, released and KoLeo, which are options)

    L_I  intra-level, image:   CE( p_t_img[q], p_s_img[v] )                                               `image_term`
    L_R  intra-level, region:  sum_i w_i CE( p_t_reg[q, m(i)], p_s_reg[v, i] ), m(i) the matching patch   `region_term`
    L_S  inter-level, student: KL( sum_i a_s[v, i] p_s_reg[v, i] || p_s_img[v] )                          `inter_student_term`
    L_T  inter-level, teacher: KL( sum_i a_t[q, i] p_t_reg[q, i] || p_t_img[q] ), which trains the        `inter_teacher_term`
         student's scorer alone
    L_N, which training images a view resembles: `relations.relation_term`.
    L_M, iBOT's (arXiv 2111.07832), is of the patches i in M_q of the global view q that the student does not see, a mean over
    the batch and q:           1 / |M_q| sum_i CE( p_t_reg[q, i], p_s_reg[q, i] )                         `pair_masked`

`plain_terms` computes the four terms as written, with all B x V x N x K log-probabilities in memory. Training computes the same
numbers with `streamed.streamed_terms`, which stores none of them; tests compare the two in value and gradient.
`cmd_objective` is where all terms are summed.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from cmd_jax.method import released
from cmd_jax.method.centers import sinkhorn_center, update_center
from cmd_jax.method.chunks import Streaming
from cmd_jax.method.koleo import koleo
from cmd_jax.method.logits import student_logits, teacher_logits
from cmd_jax.method.products import product
from cmd_jax.method.regions import Places, match_by_location, match_by_similarity
from cmd_jax.method.relations import Relations, relation_term
from cmd_jax.method.streamed import FOUR_TERMS, streamed_terms
from cmd_jax.method.types import (
    Centers,
    Pairing,
    PrototypePair,
    StudentViews,
    TeacherViews,
    Terms,
    TermWeights,
    Views,
)

Array = jax.Array
RegionWeights = Literal["teacher_mil", "uniform"]
Centering = Literal["ema", "sinkhorn"]
TEACHER_VIEWS = 2


class Objective(NamedTuple):
    """Loss and centers of one batch.

    Attributes:
        loss: [] float32, the only part with a gradient.
        terms: [] float32 each, unweighted, by name.
        centers: after the step.
        teacher_entropy: [B, Q] float32, nats, of the teacher's image level.
        marginal_entropy: [] float32, nats, of the mean distribution of the batch.
    """

    loss: Array
    terms: dict[str, Array]
    centers: Centers
    teacher_entropy: Array
    marginal_entropy: Array


def image_term(teacher_log_probs: Array, student_log_probs: Array, pairing: Pairing) -> Array:
    """L_I of the student's views of one size: sum over (q, v) of weight[q, v] * CE(p_t[q], p_s[v]), mean over B.

    Args:
        teacher_log_probs: [B, Q, K] log-probabilities.
        student_log_probs: [B, V, K] log-probabilities.
        pairing: of these views.

    Returns:
        [].
    """
    cross_entropy = -product("bqk,bvk->bqv", jnp.exp(teacher_log_probs), student_log_probs)
    return jnp.sum(pairing.image_weights * jnp.mean(cross_entropy, axis=0))


def region_term(teacher_log_probs: Array, student_log_probs: Array, pairing: Pairing) -> Array:
    """L_R of the student's views of one size: sum over (q, v, i) of w[q, v, i] * CE(p_t[q, m(i)], p_s[v, i]), mean over B.

    Args:
        teacher_log_probs: [B, Q, M, K] log-probabilities.
        student_log_probs: [B, V, N, K] log-probabilities.
        pairing: of these views.

    Returns:
        [].
    """
    batch, queries, views, patches = pairing.match.shape
    index = pairing.match.reshape(batch, queries, views * patches, 1)
    targets = jnp.exp(jnp.take_along_axis(teacher_log_probs, index, axis=2)).reshape(batch, queries, views, patches, -1)
    cross_entropy = -jnp.sum(targets * student_log_probs[:, None], axis=-1)  # [B, Q, V, N]
    return jnp.sum(pairing.region_weights * cross_entropy) / batch


def bag_divergence(mil_weights: Array, region_log_probs: Array, image_log_probs: Array) -> Array:
    """KL(bag || image) of the bag sum_i a_i p_i and the image distribution: the image must cover what its patches predict.

    Args:
        mil_weights: [..., N], a; sum to 1.
        region_log_probs: [..., N, K] log-probabilities.
        image_log_probs: [..., K] log-probabilities.

    Returns:
        [...], nats.
    """
    bag_log_probs = jax.nn.logsumexp(region_log_probs, axis=-2, b=mil_weights[..., None])
    return jnp.sum(jnp.exp(bag_log_probs) * (bag_log_probs - image_log_probs), axis=-1)


def inter_student_term(mil_weights: Array, region_log_probs: Array, image_log_probs: Array, pairing: Pairing) -> Array:
    """L_S of the student's views of one size: arguments of `bag_divergence` with leading [B, V] -> []."""
    divergence = bag_divergence(mil_weights, region_log_probs, image_log_probs)  # [B, V]
    return jnp.sum(jnp.sum(pairing.image_weights, axis=0) * jnp.mean(divergence, axis=0))


def inter_teacher_term(scorer_weights: Array, region_log_probs: Array, image_log_probs: Array) -> Array:
    """L_T: arguments of `bag_divergence` with leading [B, Q] -> []; only `scorer_weights` carries a gradient."""
    return jnp.mean(bag_divergence(scorer_weights, *jax.lax.stop_gradient((region_log_probs, image_log_probs))))


def plain_terms(
    student: tuple[StudentViews, ...],
    prototypes: PrototypePair,
    inter_teacher_weights: Array,
    teacher: TeacherViews,
    pairings: tuple[Pairing, ...],
    *,
    weights: TermWeights,
    student_temp: float,
) -> Terms:
    """The four terms with every distribution stored, B x V x N x K numbers; arguments of `streamed.streamed_terms`."""
    teacher = jax.lax.stop_gradient(teacher)
    log_probs = lambda logits: jax.nn.log_softmax(logits, axis=-1)
    levels = zip((teacher.image_z, teacher.region_z), teacher.prototypes, teacher.centers, strict=True)
    teacher_image, teacher_region = (log_probs(teacher_logits(*level, teacher.temp)) for level in levels)
    terms = {name: jnp.zeros((), teacher_image.dtype) for name in FOUR_TERMS}
    for group, pairing in zip(student, pairings, strict=True):
        image = log_probs(student_logits(group.image_z, prototypes.image, student_temp))
        region = log_probs(student_logits(group.region_z, prototypes.region, student_temp))
        if weights.intra_image:
            terms["intra_image"] += image_term(teacher_image, image, pairing)
        if weights.intra_region:
            terms["intra_region"] += region_term(teacher_region, region, pairing)
        if weights.inter_student:
            terms["inter_student"] += inter_student_term(group.mil_weights, region, image, pairing)
    if weights.inter_teacher:
        terms["inter_teacher"] = inter_teacher_term(inter_teacher_weights, teacher_region, teacher_image)
    entropy = lambda probs: -jnp.sum(jax.scipy.special.xlogy(probs, probs), axis=-1)
    probs = jnp.exp(teacher_image)
    loss = weights.total(terms)
    return Terms(loss, terms, entropy(probs), entropy(jnp.mean(probs, axis=(0, 1))))


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
        first: index of the group's first view among all of the student's; the teacher's views are the first two.
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


def pair_masked(masks: Array) -> Pairing:
    """Pairs each masked patch of a student's global view with the teacher's of the same view: `region_term` is then L_M.

    Args:
        masks: [B, Q, N] bool, the patches that the student does not see; a view without any adds nothing.
    """
    _, views, patches = masks.shape
    weights = masks / jnp.maximum(jnp.sum(masks, axis=-1, keepdims=True), 1) / views  # [B, V, N]
    same = jnp.eye(views)[None, :, :, None]
    region_weights = same * weights[:, None]  # [B, Q, V, N]
    match = jnp.broadcast_to(jnp.arange(patches), region_weights.shape)
    return Pairing(jnp.zeros((views, views)), match, region_weights)


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
    streaming: Streaming | None = None,
    places: tuple[Places, ...] | None = None,
    masks: Array | None = None,
    relations: Relations | None = None,
) -> Objective:
    """Computes the loss of one batch and the centers after it.

    Args:
        student: the global views (V = 2) and, if any, the local views, each group of one size.
        student_prototypes: W of the student.
        teacher: the two global views; nothing in it receives gradient.
        teacher_prototypes: W of the teacher, without gradient.
        inter_teacher_weights: [B, 2, N] MIL weights a_t of L_T: the student's scorer on the teacher's embeddings.
        centers: before the step; the teacher's distributions use these.
        weights: of the terms; a weight of 0 leaves the term out of the program.
        region_weights: "teacher_mil" weighs a region by its matched teacher patch, "uniform" is EsViT's mean.
        student_temp: tau_s.
        teacher_temp: tau_t.
        center_momentum: of the centers' moving average.
        centering: "ema" uses and updates the centers, "sinkhorn" replaces them by those of the batch.
        streaming: chunk, dtype and mesh of the streamed terms; None: `plain_terms`.
        places: where the student's views lie, group by group, the first of them the teacher's too: regions match by location.
            None: by similarity.
        masks: [B, 2, N] bool, patches of the global views that the student did not see; read by L_M alone.
        relations: what L_N alone reads.
    """
    stop = jax.lax.stop_gradient
    teacher, teacher_prototypes, centers = stop(teacher), stop(teacher_prototypes), stop(centers)
    whole = streaming or Streaming(chunk=student_prototypes.image.shape[0])
    use_regions = weights.use_regions
    levels = ((teacher.image_z, teacher_prototypes.image), (teacher.region_z, teacher_prototypes.region))
    if centering == "sinkhorn":
        solve = lambda z, rows: sinkhorn_center(z, rows, teacher_temp, whole)
        centers = Centers(solve(*levels[0]), solve(*levels[1]) if use_regions else centers.region)

    views = sum(group.image_z.shape[1] for group in student)
    firsts = (0, TEACHER_VIEWS)
    of_group = [None] * len(student) if places is None else [(place, places[0]) for place in places]
    pairings = tuple(
        pair_views(group, teacher, first, views, region_weights, place)
        for group, first, place in zip(student, firsts[: len(student)], of_group, strict=True)
    )
    teacher_views = TeacherViews(teacher.image_z, teacher.region_z, teacher_prototypes, centers, jnp.asarray(teacher_temp))
    groups = tuple(StudentViews(group.image_z, group.region_z, group.mil_weights) for group in student)
    terms = functools.partial(streamed_terms, streaming=streaming) if streaming else plain_terms
    four = terms(
        groups,
        student_prototypes,
        inter_teacher_weights,
        teacher_views,
        pairings,
        weights=weights,
        student_temp=student_temp,
    )

    extra: dict[str, Array] = {}
    if weights.relation:
        embeddings = jnp.concatenate([group.image_embedding for group in student], axis=1)
        extra["relation"] = relation_term(embeddings, relations)
    if weights.intra_masked:  # of the global views alone, so apart from the terms of all views
        of_masked = groups[:1], student_prototypes, inter_teacher_weights, teacher_views, (pair_masked(masks),)
        extra["intra_masked"] = terms(*of_masked, weights=TermWeights(0.0, 1.0, 0.0, 0.0), student_temp=student_temp).loss
    if weights.released:
        extra["released"] = released.term(student, student_prototypes, teacher_views, pairings, student_temp, whole)
    if weights.koleo:  # of each view by itself: views of one image are no neighbours
        extra["koleo"] = jnp.mean(jax.vmap(koleo, in_axes=1)(student[0].image_embedding))
    loss = weights.total(extra, start=four.loss)

    if centering == "ema":
        update = lambda center, level: update_center(center, *level, center_momentum)
        centers = Centers(
            update(centers.image, levels[0]), update(centers.region, levels[1]) if use_regions else centers.region
        )
    return Objective(loss, four.terms | extra, centers, four.teacher_entropy, four.marginal_entropy)
