"""What the objective is computed from: rows of student and teacher, their pairing, prototypes, centers, weights.

Letters: B images, V student views of one size, Q = 2 teacher views, N patches of a student view, M of a teacher view,
d bottleneck width, K prototypes.
"""

from typing import NamedTuple

import jax

Array = jax.Array


class TermWeights(NamedTuple):
    """Weights of the terms: DINO is (1, 0, 0, 0), EsViT (0.5, 0.5, 0, 0), CMD (0.5, 0.5, lambda, lambda).

    `released` weighs the term of the authors' code, which is 0 but in the variant "released", (0.5, 0.5, 0, 0, 1).
    """

    intra_image: float
    intra_region: float
    inter_student: float
    inter_teacher: float
    released: float = 0.0


class PrototypePair(NamedTuple):
    """Prototype rows of the image and the region level, each [K, d] float32."""

    image: Array
    region: Array


class Centers(NamedTuple):
    """Centers of the teacher's logits at the image and the region level, each [K] float32."""

    image: Array
    region: Array


class StudentRows(NamedTuple):
    """What the student says of its views of one size.

    Attributes:
        image_z: [B, V, d].
        region_z: [B, V, N, d].
        mil_weights: [B, V, N], sum to 1 over N.
    """

    image_z: Array
    region_z: Array
    mil_weights: Array


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


class TeacherRows(NamedTuple):
    """What the teacher says of its two global views; carries no gradient.

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
