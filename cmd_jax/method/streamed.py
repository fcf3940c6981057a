"""Distributions over K prototypes, streamed: no array has both an axis of K and one of patches.

Logits are W z / temp, so a cross-entropy against a fixed target p needs of p only the d-vector M = sum_k p_k W[k]:

    CE(p, softmax(s)) = logsumexp(s) - z . M / temp,   s = W z / temp

and its gradient only E[W] under softmax(s). `streamed_terms` computes all four terms and their gradients in three passes
over chunks of K: normalizers, then everything that needs the normalizers alone, then the student's gradients, which
need the sums of the second pass. The loss ends the graph, so its cotangent is one number, and the forward pass can already
compute the gradients: each product with W is done once a pass and never kept. Matched targets come in two ways, see
`chunks.Streaming`.

Letters: B images, V student views of one size, Q = 2 teacher views, N patches of a student view, M of a teacher view,
d bottleneck width, K prototypes. With D = KL(pi || q), pi = sum_i a_i sigma_i a bag's mixture, q = softmax(x) its image and
t_k = log pi_k - log q_k + 1:

    dD/ds_ik = a_i sigma_ik (t_k - T_i),   dD/da_i = T_i = sum_k sigma_ik t_k,   dD/dx_k = q_k - pi_k
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from cmd_jax.method import bags
from cmd_jax.method.chunks import DATA, Normalizer, Streaming, for_chunks, put_chunk, take_chunk
from cmd_jax.method.products import operand, product
from cmd_jax.method.types import (
    Centers,
    Pairing,
    PrototypePair,
    StudentViews,
    TeacherViews,
    Terms,
    TermWeights,
)

Array = jax.Array
FOUR_TERMS = ("intra_image", "intra_region", "inter_student", "inter_teacher")


def streamed_terms(
    student: tuple[StudentViews, ...],
    prototypes: PrototypePair,
    inter_teacher_weights: Array,
    teacher: TeacherViews,
    pairings: tuple[Pairing, ...],
    *,
    weights: TermWeights,
    student_temp: float,
    streaming: Streaming,
) -> Terms:
    """The intra-level and inter-level terms, exact in value and gradient.

    Args:
        student: one element for each size of views.
        prototypes: W of the student.
        inter_teacher_weights: [B, Q, M] MIL weights a_t of L_T; the only input of that term with a gradient.
        teacher: without gradient.
        pairings: one for each element of `student`, without gradient.
        weights: of the terms; one of weight 0 is left out of the program. Only the first four are computed here.
        student_temp: tau_s.
        streaming: chunk, dtype and mesh.
    """
    plan = _Plan(weights, float(student_temp), streaming)
    teacher, pairings = lax.stop_gradient((teacher, pairings))
    # What no term reads is cut off here, so that no backward pass of zeros runs through the network.
    if not (weights.intra_region or weights.inter_student):
        student = tuple(group._replace(region_z=lax.stop_gradient(group.region_z)) for group in student)
        prototypes = prototypes._replace(region=lax.stop_gradient(prototypes.region))
    if not weights.inter_student:
        student = tuple(group._replace(mil_weights=lax.stop_gradient(group.mil_weights)) for group in student)
    if not weights.inter_teacher:
        inter_teacher_weights = lax.stop_gradient(inter_teacher_weights)
    loss, terms, *entropies = _distil(plan, student, prototypes, inter_teacher_weights, teacher, pairings)
    return Terms(loss, {name: terms[name] for name in FOUR_TERMS}, *entropies)


class _Plan(NamedTuple):
    """What is known when the program is built."""

    weights: TermWeights
    student_temp: float
    streaming: Streaming


class _Tile(NamedTuple):
    """One value for each set of rows: logits [..., chunk] of a chunk, or what has been summed up over K."""

    student_image: tuple[Any, ...]
    student_region: tuple[Any, ...]
    teacher_image: Any
    teacher_region: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _distil(plan, student, prototypes, scorer, teacher, pairings):
    return _run(plan, student, prototypes, scorer, teacher, pairings, with_gradients=False)[0]


def _distil_forward(plan, student, prototypes, scorer, teacher, pairings):
    return _run(plan, student, prototypes, scorer, teacher, pairings, with_gradients=True)


def _distil_backward(plan, gradients, cotangents):
    # Terms and entropies are for the log: only the loss has a gradient.
    scaled = jax.tree.map(lambda gradient: (cotangents[0] * gradient).astype(gradient.dtype), gradients)
    return (*scaled, None, None)


_distil.defvjp(_distil_forward, _distil_backward)


def _run(plan, *arguments, with_gradients: bool):
    """((loss, terms, both entropies), gradients for (student, prototypes, scorer) or None), on one device or a mesh.

    On a mesh each device passes over its images; the loss, the gradients of W and the use of each prototype are added up over
    the devices, once each, and nothing is gathered.
    """
    images, alike = PartitionSpec(DATA), PartitionSpec()
    pair = PrototypePair(alike, alike)
    of_teacher = TeacherViews(images, images, pair, Centers(alike, alike), alike)
    of_pairings = tuple(Pairing(alike, images, images) for _ in arguments[-1])
    out = (alike, alike, images, alike), (images, pair, images) if with_gradients else None
    local = lambda *arguments: _Passes(plan, *arguments).run(with_gradients)
    return plan.streaming.on_mesh(local, (images, pair, images, of_teacher, of_pairings), out)(*arguments)


class _Sums(NamedTuple):
    """What the second pass adds up over K; None where no term needs it."""

    entropy: Array  # [B, Q] of the teacher's image level
    intra_image: Array  # []
    intra_region: Array | None  # [] with gathered targets
    region_targets: Array | None  # [B, Q, M, d] expected prototypes of the student under the teacher, with expected targets
    student_divergence: tuple[Array, ...] | None  # [B, V] each
    student_slopes: tuple[Array, ...] | None  # [B, V, N] each, T_i
    teacher_divergence: Array | None  # [B, Q]
    teacher_slopes: Array | None  # [B, Q, M]


class _Gradients(NamedTuple):
    """Gradients of the loss while they are summed up: rows by temperature, as the logits have them, and W."""

    image_z: tuple[Array, ...]  # [B, V, d] each
    region_z: tuple[Array, ...]  # [B, V, N, d] each, none without regions
    image_prototypes: Array  # [K, d]
    region_prototypes: Array


def _matching(pairing: Pairing, patches: int) -> Array:
    """Weights of the matched pairs as a matrix from student to teacher patches, [B, V, N, Q, M] with one entry in a row of M.

    Products with it, and with its transpose, stand for a gather of teacher rows and a scatter-add of student rows: they add up
    in a fixed order on every backend, and are what a TPU is built for.
    """
    match, weights = (jnp.moveaxis(x, 1, -1)[..., None] for x in (pairing.match, pairing.region_weights))
    return jnp.where(match == jnp.arange(patches), weights, 0.0)


class _Passes:
    """The three passes over one batch."""

    def __init__(self, plan, student, prototypes, scorer, teacher, pairings):
        self.weights, self.streaming, self.temp = plan.weights, plan.streaming, plan.student_temp
        self.student, self.prototypes, self.scorer, self.teacher, self.pairings = student, prototypes, scorer, teacher, pairings
        self.accumulated = jnp.promote_types(teacher.image_z.dtype, jnp.float32)
        self.product = functools.partial(product, dtype=plan.streaming.dtype)  # with prototypes, over d or K
        self.expected = plan.streaming.targets == "expected"
        self.student_regions = bool(self.weights.intra_region or self.weights.inter_student)
        self.teacher_regions = bool(self.weights.intra_region or self.weights.inter_teacher)
        scaled = lambda z, temp: operand(z / temp, plan.streaming.dtype)
        # rows by their temperature, so that a product with W gives logits
        self.rows = _Tile(
            tuple(scaled(group.image_z, self.temp) for group in student),
            tuple(scaled(group.region_z, self.temp) for group in student) if self.student_regions else (),
            scaled(teacher.image_z, teacher.temp),
            scaled(teacher.region_z, teacher.temp) if self.teacher_regions else None,
        )
        batch = self.batch = teacher.image_z.shape[0] * plan.streaming.devices  # images of all devices
        self.image_weights = [jnp.sum(pairing.image_weights, axis=0) / batch for pairing in pairings]  # [V] each
        self.region_weights = [jnp.sum(pairing.region_weights, axis=1) / batch for pairing in pairings]  # [B, V, N] each
        patches = teacher.region_z.shape[2]
        self.matching = [_matching(pairing, patches) / batch for pairing in pairings] if self.expected else None

    def outer(self, slopes: Array, rows: Array) -> Array:
        """sum over all leading axes of slopes x rows: [..., k], [..., d] -> [k, d]."""
        # The tile stays as it lies in memory: rows and result are what is transposed. Without the barrier the compiler
        # folds the last transposition back into the product, which then reads the tile against its grain.
        flat = slopes.reshape(-1, slopes.shape[-1])
        return lax.optimization_barrier(self.product("ds,sk->dk", rows.reshape(-1, rows.shape[-1]).T, flat)).T

    def loop(self, body, carry):
        return for_chunks(self.prototypes.image.shape[0], self.streaming.chunk, body, carry)

    def logits(self, start: Array | int, size: int) -> _Tile:
        """Logits of a chunk."""
        of_student = [take_chunk(rows, start, size) for rows in self.prototypes]
        of_teacher = [take_chunk(rows, start, size) for rows in self.teacher.prototypes]
        shifts = [take_chunk(center, start, size) / self.teacher.temp for center in self.teacher.centers]
        times = lambda rows, prototypes: self.product("...d,kd->...k", rows, prototypes)
        return _Tile(
            tuple(times(rows, of_student[0]) for rows in self.rows.student_image),
            tuple(times(rows, of_student[1]) for rows in self.rows.student_region),
            times(self.rows.teacher_image, of_teacher[0]) - shifts[0],
            times(self.rows.teacher_region, of_teacher[1]) - shifts[1] if self.teacher_regions else None,
        )

    def normalizers(self) -> _Tile:
        """First pass: log-sum-exp of every row."""
        empty = jax.tree.map(lambda rows: Normalizer.start(rows.shape[:-1], self.accumulated), self.rows)
        is_state = lambda x: isinstance(x, Normalizer)

        def add(states: _Tile, start: Array | int, size: int) -> _Tile:
            return jax.tree.map(lambda state, logits: state.add(logits), states, self.logits(start, size), is_leaf=is_state)

        return jax.tree.map(lambda state: state.finish(), self.loop(add, empty), is_leaf=is_state)

    def log_probs(self, normalizers: _Tile, start: Array | int, size: int) -> _Tile:
        return jax.tree.map(lambda logits, lse: logits - lse[..., None], self.logits(start, size), normalizers)

    def image_targets(self, pairing: Pairing, probs: Array) -> Array:
        """The teacher's probabilities for a group's images: [B, Q, k] -> sum_q weight * probs[q], [B, V, k]."""
        return product("qv,bqk->bvk", pairing.image_weights, probs) / self.batch

    def matched(self, group: int, targets: Array) -> Array:
        """Weighted targets of the teacher patches that a group is matched to: [B, Q, M, d] -> [B, V, N, d]."""
        return product("bvnqm,bqmd->bvnd", self.matching[group], targets)

    def matched_probs(self, pairing: Pairing, probs: Array) -> Array:
        """The same for a chunk of the teacher's probabilities, gathered: [B, Q, M, k] -> [B, V, N, k]; k can exceed d."""
        batch, views, *_ = pairing.match.shape
        index, weights = pairing.match.reshape(batch, views, -1), pairing.region_weights.reshape(batch, views, -1)
        take = jax.vmap(jax.vmap(lambda rows, index: rows.at[index].get(mode="promise_in_bounds")))
        found = take(probs, index)  # [B, Q, V * N, k]
        # written out for the few q: a fused multiplication and addition instead of a small product for each patch
        total = sum(weights[:, q, :, None] * found[:, q] for q in range(views))
        return total.reshape(batch, *pairing.match.shape[2:], probs.shape[-1]) / self.batch

    def assigned(self) -> Array:
        """Weighted student rows summed up on the teacher's patches they are matched to, [B, Q, M, d].

        With expected targets the gradient of all pairs for W is one product of these with the teacher's probabilities.
        """
        parts = zip(self.matching, self.rows.student_region, strict=True)
        return sum(product("bvnqm,bvnd->bqmd", matching, rows) for matching, rows in parts)

    def run(self, with_gradients: bool):
        """((loss, terms, both entropies), gradients for (student, prototypes, scorer) or None)."""
        w = self.weights
        normalizers = self.normalizers()
        zeros = lambda *shape: jnp.zeros(shape, self.accumulated)
        like = lambda x: jnp.zeros(x.shape, self.accumulated)
        sums = _Sums(
            entropy=zeros(*self.teacher.image_z.shape[:2]),
            intra_image=zeros(),
            intra_region=zeros() if w.intra_region and not self.expected else None,
            region_targets=like(self.teacher.region_z) if w.intra_region and self.expected else None,
            student_divergence=tuple(zeros(*g.image_z.shape[:2]) for g in self.student) if w.inter_student else None,
            student_slopes=tuple(like(g.mil_weights) for g in self.student) if w.inter_student else None,
            teacher_divergence=zeros(*self.teacher.image_z.shape[:2]) if w.inter_teacher else None,
            teacher_slopes=like(self.scorer) if w.inter_teacher else None,
        )
        gradients = assigned = None
        if with_gradients:
            rows = (self.rows.student_image, self.rows.student_region, *self.prototypes)
            gradients = _Gradients(*jax.tree.map(like, rows))
            assigned = self.assigned() if w.intra_region and self.expected else None
        # Without L_S the student's gradients need nothing of the second pass, which then computes both.
        third = with_gradients and bool(w.inter_student)

        def second_pass(carry, start, size):
            sums, marginal, gradients = carry
            log_probs = self.log_probs(normalizers, start, size)
            sums = self.add_sums(sums, log_probs, start, size)
            marginal = put_chunk(marginal, jnp.sum(jnp.exp(log_probs.teacher_image), axis=(0, 1)), start)
            if assigned is not None:
                part = -w.intra_region * self.outer(jnp.exp(log_probs.teacher_region), assigned)
                gradients = gradients._replace(region_prototypes=put_chunk(gradients.region_prototypes, part, start))
            if with_gradients and not third:
                gradients = self.add_student(gradients, log_probs, None, start, size)
            return sums, marginal, gradients

        marginal = zeros(self.prototypes.image.shape[0])  # [K] sums of the teacher's probabilities
        sums, marginal, gradients = self.loop(second_pass, (sums, marginal, gradients))
        if third:
            gradients = self.loop(
                lambda gradients, start, size: self.add_student(
                    gradients, self.log_probs(normalizers, start, size), sums, start, size
                ),
                gradients,
            )

        terms = {name: zeros() for name in FOUR_TERMS}
        if w.intra_image:
            terms["intra_image"] = sums.intra_image
        if w.intra_region and not self.expected:
            terms["intra_region"] = sums.intra_region
        for index, weights in enumerate(self.region_weights):
            if w.intra_region and self.expected:
                rows = self.rows.student_region[index].astype(self.accumulated)
                toward = jnp.sum(rows * self.matched(index, sums.region_targets))
                terms["intra_region"] += jnp.sum(weights * normalizers.student_region[index]) - toward
            if w.inter_student:
                terms["inter_student"] += jnp.sum(self.image_weights[index] * sums.student_divergence[index])
        if w.inter_teacher:
            terms["inter_teacher"] = jnp.sum(sums.teacher_divergence) / (self.batch * self.scorer.shape[1])
        of_prototypes = gradients[2:] if with_gradients else ()
        terms, marginal = self.streaming.total((terms, marginal))
        of_prototypes = self.streaming.total_gradients(of_prototypes)
        loss = w.total(terms)
        share = marginal / (self.batch * self.teacher.image_z.shape[1])
        marginal_entropy = -jnp.sum(jax.scipy.special.xlogy(share, share))
        out = (loss, terms, sums.entropy, marginal_entropy)
        return (out, self.finish(gradients, sums, PrototypePair(*of_prototypes)) if with_gradients else None)

    def add_sums(self, sums: _Sums, log_probs: _Tile, start: Array | int, size: int) -> _Sums:
        """Second pass: the sums with a chunk counted in."""
        w = self.weights
        image_probs = jnp.exp(log_probs.teacher_image)
        sums = sums._replace(entropy=sums.entropy - jnp.sum(image_probs * log_probs.teacher_image, axis=-1))
        if w.intra_image:
            against = zip(self.pairings, log_probs.student_image, strict=True)
            total = sum(jnp.sum(self.image_targets(pairing, image_probs) * image) for pairing, image in against)
            sums = sums._replace(intra_image=sums.intra_image - total)
        if w.intra_region and self.expected:
            of_region = take_chunk(self.prototypes.region, start, size)
            targets = self.product("...k,kd->...d", jnp.exp(log_probs.teacher_region), of_region)
            sums = sums._replace(region_targets=sums.region_targets + targets)
        elif w.intra_region:
            probs, against = jnp.exp(log_probs.teacher_region), zip(self.pairings, log_probs.student_region, strict=True)
            total = sum(product("bvnk,bvnk->", self.matched_probs(pairing, probs), regions) for pairing, regions in against)
            sums = sums._replace(intra_region=sums.intra_region - total)
        if w.inter_student:
            parts = [
                bags.sums(group.mil_weights, regions, image)
                for group, regions, image in zip(self.student, log_probs.student_region, log_probs.student_image, strict=True)
            ]
            add = lambda old, which: tuple(a + part[which] for a, part in zip(old, parts, strict=True))
            sums = sums._replace(student_divergence=add(sums.student_divergence, 0), student_slopes=add(sums.student_slopes, 1))
        if w.inter_teacher:
            of_teacher = log_probs.teacher_region, log_probs.teacher_image
            divergence, slopes = bags.sums(self.scorer, *of_teacher)
            sums = sums._replace(
                teacher_divergence=sums.teacher_divergence + divergence, teacher_slopes=sums.teacher_slopes + slopes
            )
        return sums

    def add_student(
        self, gradients: _Gradients, log_probs: _Tile, sums: _Sums | None, start: Array | int, size: int
    ) -> _Gradients:
        """The student's gradients of a chunk; sums: of the second pass, None without L_S."""
        w = self.weights
        of_image, of_region = (take_chunk(rows, start, size) for rows in self.prototypes)
        image_part, region_part = (take_chunk(part, start, size) for part in gradients[2:])
        image_z, region_z = list(gradients.image_z), list(gradients.region_z)
        for index, (group, pairing) in enumerate(zip(self.student, self.pairings, strict=True)):
            log_image, weight = log_probs.student_image[index], self.image_weights[index][:, None]
            image_probs, slope_image = jnp.exp(log_image), 0.0
            if w.intra_image:
                targets = self.image_targets(pairing, jnp.exp(log_probs.teacher_image))
                slope_image += w.intra_image * (weight * image_probs - targets)  # [B, V, k]
            if self.student_regions:
                log_regions = log_probs.student_region[index]
                probs = jnp.exp(log_regions)
                slope_region = w.intra_region * self.region_weights[index][..., None]  # [B, V, N, 1]
                if w.inter_student:
                    mixture, t = bags.mixture_slope(group.mil_weights, probs, log_image)
                    slope_image += w.inter_student * weight * (image_probs - mixture)
                    bag = w.inter_student * weight * group.mil_weights  # [B, V, N]
                    slope_region = slope_region + bag[..., None] * (t[..., None, :] - sums.student_slopes[index][..., None])
                slope_region = slope_region * probs
                if w.intra_region and not self.expected:
                    slope_region -= w.intra_region * self.matched_probs(pairing, jnp.exp(log_probs.teacher_region))
                region_z[index] += self.product("bvnk,kd->bvnd", slope_region, of_region)
                region_part += self.outer(slope_region, self.rows.student_region[index])
            if w.intra_image or w.inter_student:
                image_z[index] += self.product("bvk,kd->bvd", slope_image, of_image)
                image_part += self.outer(slope_image, self.rows.student_image[index])
        gradients = gradients._replace(
            image_z=tuple(image_z),
            region_z=tuple(region_z),
            image_prototypes=put_chunk(gradients.image_prototypes, image_part, start),
        )
        if self.student_regions:
            gradients = gradients._replace(region_prototypes=put_chunk(gradients.region_prototypes, region_part, start))
        return gradients

    def finish(self, gradients: _Gradients, sums: _Sums, of_prototypes: PrototypePair):
        """Gradients for (student, prototypes, scorer)."""
        w = self.weights
        image_z, region_z = gradients.image_z, gradients.region_z
        student = []
        for index, group in enumerate(self.student):
            of_region, of_weights = jnp.zeros_like(group.region_z), jnp.zeros_like(group.mil_weights)
            if self.student_regions:
                of_region = region_z[index]
                if w.intra_region and self.expected:
                    of_region -= w.intra_region * self.matched(index, sums.region_targets)
                of_region /= self.temp
            if w.inter_student:
                of_weights = w.inter_student * self.image_weights[index][:, None] * sums.student_slopes[index]
            student.append(StudentViews(image_z[index] / self.temp, of_region, of_weights))
        scorer = jnp.zeros_like(self.scorer)
        if w.inter_teacher:
            scorer = w.inter_teacher / (self.batch * self.scorer.shape[1]) * sums.teacher_slopes
        inputs, outputs = (self.student, self.prototypes, self.scorer), (tuple(student), of_prototypes, scorer)
        return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), outputs, inputs)
