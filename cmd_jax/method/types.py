"""Types of the objective: views of one size, their pairing with the teacher's, prototypes, centers and term weights.

Letters: B images, V student views of one size, Q = 2 teacher views, N patches of a student view, M of a teacher view,
D backbone width, d bottleneck width, K prototypes.
"""

from typing import NamedTuple

import jax

Array = jax.Array


class TermWeights(NamedTuple):
    """Weights of the loss terms: DINO is (1, 0, 0, 0), EsViT (0.5, 0.5, 0, 0), CMD (0.5, 0.5, lambda, lambda).

    `relation` weighs L_N, `released` the term of the authors' code, `intra_masked` that of iBOT's masked patches and
    `koleo` DINOv2's regulariser.
    """

    intra_image: float
    intra_region: float
    inter_student: float
    inter_teacher: float
    released: float = 0.0
    intra_masked: float = 0.0
    koleo: float = 0.0
    relation: float = 0.0

    @property
    def use_image(self) -> bool:
        """Whether a term reads distributions of the image level."""
        return any((self.intra_image, self.inter_student, self.inter_teacher, self.released))

    @property
    def use_regions(self) -> bool:
        """Whether a term reads distributions of regions."""
        return any((self.intra_region, self.inter_student, self.inter_teacher, self.released, self.intra_masked))

    def total(self, terms: dict[str, Array], start: Array | float = 0.0) -> Array:
        """start + sum of weight * term over the given terms: [] float32. A term of weight 0 is left out, whatever its value."""
        for name, weight in self._asdict().items():
            if name in terms and not (isinstance(weight, int | float) and weight == 0):
                start = start + weight * terms[name]
        return start


class PrototypePair(NamedTuple):
    """Prototype rows of the image and the region level, each [K, d] float32."""

    image: Array
    region: Array


class Centers(NamedTuple):
    """Centers of the teacher's logits at the image and the region level, each [K] float32."""

    image: Array
    region: Array


class Views(NamedTuple):
    """Outputs of one network for views of one size.

    Attributes:
        image_z: [B, V, d] float32, unit norm.
        region_z: [B, V, N, d] float32, unit norm.
        features: [B, V, N, D] patch embeddings of the backbone, compared by cosine where regions match by similarity.
        mil_weights: [B, V, N] float32, sum to 1 over N.
        image_embedding: [B, V, F], read by L_N and the KoLeo term.
    """

    image_z: Array
    region_z: Array
    features: Array
    mil_weights: Array
    image_embedding: Array | None = None


class StudentViews(NamedTuple):
    """The part of the student's `Views` that the four terms differentiate.

    Attributes:
        image_z: [B, V, d].
        region_z: [B, V, N, d].
        mil_weights: [B, V, N], sum to 1 over N.
    """

    image_z: Array
    region_z: Array
    mil_weights: Array


class TeacherViews(NamedTuple):
    """The teacher's two global views with all that turns them into distributions; carries no gradient.

    Attributes:
        image_z: [B, Q, d].
        region_z: [B, Q, M, d].
        prototypes: W of the teacher.
        centers: of its logits.
        temp: [] tau_t.
    """

    image_z: Array
    region_z: Array
    prototypes: PrototypePair
    centers: Centers
    temp: Array


class Pairing(NamedTuple):
    """How the student's views of one size are paired with the teacher's; carries no gradient.

    Attributes:
        image_weights: [Q, V] weight of CE(teacher view q, student view v); sums to 1 over q and all views, times B.
        match: [B, Q, V, N] int32, the teacher's patch that a student's patch is matched to.
        region_weights: [B, Q, V, N] weight of each matched pair of patches.
    """

    image_weights: Array
    match: Array
    region_weights: Array


class Terms(NamedTuple):
    """The four terms of a batch.

    Attributes:
        loss: [] float32, their weighted sum.
        terms: [] float32 each, unweighted, by the names of `TermWeights`; 0 where the weight is 0; streamed without gradient.
        teacher_entropy: [B, Q] float32, nats, of the teacher's image level.
        marginal_entropy: [] float32, nats, of its mean over batch and views: how many prototypes the batch uses.
    """

    loss: Array
    terms: dict[str, Array]
    teacher_entropy: Array
    marginal_entropy: Array
