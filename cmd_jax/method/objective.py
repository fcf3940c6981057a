"""The objective of CMD, our reading of the paper (arXiv 2401.08860), and its baselines DINO and EsViT.

Letters: B images, V student views (the first Q = 2 are global, then the local ones), N patches of a view, D backbone width,
d bottleneck width, K prototypes. All terms are means over the batch and over the ordered pairs (q, v) of a teacher view q
and a student view v != q.

    L = w_ii L_I + w_ir L_R + w_is L_S + w_it L_T

    L_I  intra-level, image:   CE( p_t_img[q], p_s_img[v] )
    L_R  intra-level, region:  sum_i w_i CE( p_t_reg[q, m(i)], p_s_reg[v, i] ), m(i) the most similar teacher patch
    L_S  inter-level, student: KL( sum_i a_s[v, i] p_s_reg[v, i] || p_s_img[v] )
    L_T  inter-level, teacher: KL( sum_i a_t[q, i] p_t_reg[q, i] || p_t_img[q] ), gradient to the student's scorer alone
The variant "released" adds to EsViT's loss the cross-level term of the authors' code, see `released`.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from cmd_jax.method import prototypes as P
from cmd_jax.method import released
from cmd_jax.method.centers import sinkhorn_center, update_center

Array = jax.Array
RegionWeights = Literal["teacher_mil", "uniform"]
Centering = Literal["ema", "sinkhorn"]
TEACHER_VIEWS = 2


class Views(NamedTuple):
    """Views of one size, as one network sees them.

    Attributes:
        image_z: [B, V, d] float32, unit norm.
        region_z: [B, V, N, d] float32, unit norm.
        features: [B, V, N, D] backbone embeddings of the patches, compared by cosine to match regions.
        mil_weights: [B, V, N] float32, sum to 1 over N.
    """

    image_z: Array
    region_z: Array
    features: Array
    mil_weights: Array


class PrototypePair(NamedTuple):
    """Prototype rows of the image and the region level, each [K, d] float32."""

    image: Array
    region: Array


class Centers(NamedTuple):
    """Centers of the teacher's logits at the image and the region level, each [K] float32."""

    image: Array
    region: Array


class TermWeights(NamedTuple):
    """Weights of the terms: DINO is (1, 0, 0, 0), EsViT (0.5, 0.5, 0, 0), CMD (0.5, 0.5, lambda, lambda).

    `released` weighs the term of the authors' code, which is 0 but in the variant "released", (0.5, 0.5, 0, 0, 1).
    """

    intra_image: float
    intra_region: float
    inter_student: float
    inter_teacher: float
    released: float = 0.0


class Result(NamedTuple):
    """The loss, its unweighted terms by name, the new centers, and the teacher's image-level probabilities [B, Q, K]."""

    loss: Array
    terms: dict[str, Array]
    centers: Centers
    teacher_image_probs: Array


def match_regions(student: Array, teacher: Array) -> Array:
    """m(i) = argmax_j cosine(student patch i, teacher patch j).

    Args:
        student: [..., N, D].
        teacher: [..., M, D].

    Returns:
        [..., N] int32 indices into the teacher's M patches.
    """

    def unit(x: Array) -> Array:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-16))

    # The highest precision: on a TPU the default rounds to bfloat16, enough to swap near ties.
    similarity = jnp.einsum("...nd,...md->...nm", unit(student), unit(teacher), precision="highest")
    return jnp.argmax(similarity, axis=-1)


def _intra_image(student_logits: Array, teacher_probs: Array, own: int | None, q: int) -> Array:
    """Sum over the views v != q of the batch mean of CE(p_t[q], p_s[v]); `own` is the index of view q, if among them."""
    log_probs = jax.nn.log_softmax(student_logits, axis=-1)  # [B, V, K]
    ce = -jnp.einsum("bk,bvk->bv", teacher_probs[:, q], log_probs)
    return _sum_other_views(jnp.mean(ce, axis=0), own)


def _sum_other_views(per_view: Array, own: int | None) -> Array:
    """[V] -> their sum without view `own`."""
    return jnp.sum(per_view) if own is None else jnp.sum(per_view, where=jnp.arange(per_view.shape[0]) != own)


def _intra_region(
    group: Views,
    region_logits: Array,
    teacher: Views,
    targets: Array,
    region_weights: str,
    own: int | None,
    q: int,
    temp: float,
) -> Array:
    """Sum over the views v != q of the batch mean of L_R; targets [B, Q, M, d] are the teacher's expected prototypes."""
    match = match_regions(group.features, teacher.features[:, q, None])  # [B, V, N]
    matched = jax.vmap(lambda rows, index: rows[index])(targets[:, q], match)  # [B, V, N, d]
    ce = jax.nn.logsumexp(region_logits, axis=-1) - jnp.einsum("bvnd,bvnd->bvn", group.region_z, matched) / temp
    if region_weights == "uniform":
        per_view = jnp.mean(ce, axis=-1)
    else:
        weights = jax.vmap(lambda row, index: row[index])(teacher.mil_weights[:, q], match)  # [B, V, N]
        weights = jax.lax.stop_gradient(weights / jnp.sum(weights, axis=-1, keepdims=True))
        per_view = jnp.sum(weights * ce, axis=-1)
    return _sum_other_views(jnp.mean(per_view, axis=0), own)


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
    """
    stop = jax.lax.stop_gradient
    teacher, teacher_prototypes, centers = stop(teacher), stop(teacher_prototypes), stop(centers)
    use_regions = any(weights[1:])
    if centering == "sinkhorn":
        centers = Centers(
            sinkhorn_center(teacher.image_z, teacher_prototypes.image, teacher_temp),
            sinkhorn_center(teacher.region_z, teacher_prototypes.region, teacher_temp) if use_regions else centers.region,
        )
    teacher_image_logits = P.teacher_logits(teacher.image_z, teacher_prototypes.image, centers.image, teacher_temp)
    teacher_image_probs = jax.nn.softmax(teacher_image_logits, axis=-1)  # [B, Q, K]
    if use_regions:
        teacher_region_logits = P.teacher_logits(teacher.region_z, teacher_prototypes.region, centers.region, teacher_temp)
    if weights.intra_region or weights.released:
        teacher_region_probs = jax.nn.softmax(teacher_region_logits, axis=-1)  # [B, Q, N, K]
    if weights.intra_region:
        targets = P.expected_prototype(teacher_region_probs, student_prototypes.region)

    zero = jnp.zeros((), jnp.float32)
    intra_image = intra_region = inter_student = inter_teacher = released_term = zero
    views = sum(group.image_z.shape[1] for group in student)
    pairs = TEACHER_VIEWS * (views - 1)
    for group_index, group in enumerate(student):
        image_logits = P.student_logits(group.image_z, student_prototypes.image, student_temp)  # [B, V, K]
        if weights.intra_region or weights.inter_student:
            region_logits = P.student_logits(group.region_z, student_prototypes.region, student_temp)  # [B, V, N, K]
        for q in range(TEACHER_VIEWS):
            own = q if group_index == 0 else None
            if weights.intra_image:
                intra_image += _intra_image(image_logits, teacher_image_probs, own, q) / pairs
            if weights.intra_region:
                intra_region += (
                    _intra_region(group, region_logits, teacher, targets, region_weights, own, q, student_temp) / pairs
                )
        # A global view stands in one pair (q, v) with q != v, a local view in both.
        times = TEACHER_VIEWS - 1 if group_index == 0 else TEACHER_VIEWS
        if weights.inter_student:
            divergence = P.mixture_divergence(group.mil_weights, region_logits, image_logits)  # [B, V]
            inter_student += times * jnp.sum(jnp.mean(divergence, axis=0)) / pairs
        if weights.released:
            bags = released.student_bags(group.region_z, student_prototypes.region, student_temp)  # [B, V, K]
            released_term += times * jnp.sum(released.divergence(image_logits, bags, released_mask)) / pairs
    if weights.released:  # every teacher view stands in views - 1 pairs
        constant = released.teacher_divergence(teacher_image_probs, teacher_region_probs)
        released_term += (views - 1) * jnp.sum(constant) / pairs
    if weights.inter_teacher:
        inter_teacher = jnp.mean(P.mixture_divergence(inter_teacher_weights, teacher_region_logits, teacher_image_logits))

    terms = {
        "intra_image": intra_image,
        "intra_region": intra_region,
        "inter_student": inter_student,
        "inter_teacher": inter_teacher,
    }
    if weights.released:
        terms["released"] = released_term
    loss = sum(weight * terms[name] for name, weight in weights._asdict().items() if weight)
    if centering == "ema":
        centers = Centers(
            update_center(centers.image, teacher.image_z, teacher_prototypes.image, center_momentum),
            update_center(centers.region, teacher.region_z, teacher_prototypes.region, center_momentum)
            if use_regions
            else centers.region,
        )
    return Result(loss, terms, centers, teacher_image_probs)
