"""Which images the teacher holds for similar, and which patches make them so."""

from typing import NamedTuple

import numpy as np

from cmd_jax.evaluation.patches import Patches

MATCHES = 5
AT_ONCE = 64  # queries


class Match(NamedTuple):
    """Two patches, one of each image.

    Attributes:
        query: patch of the first image, row-major.
        neighbour: patch of the second.
        cosine: of their tokens.
        share: of both images' similarity, in 0..1, see `matches`.
    """

    query: int
    neighbour: int
    cosine: float
    share: float


def nearest(features: np.ndarray, gallery: np.ndarray, count: int, skip: np.ndarray | None = None) -> np.ndarray:
    """The most similar gallery images of each of Q images, most similar first.

    Args:
        features: [Q, F], l2-normalised.
        gallery: [M, F], l2-normalised.
        count: how many.
        skip: [Q] row of the gallery that is the image itself; None: none is.

    Returns:
        [Q, min(count, those that are left)] int64.
    """
    left, found = len(gallery) - (skip is not None), []
    for start in range(0, len(features), AT_ONCE):
        similarity = features[start : start + AT_ONCE] @ gallery.T
        if skip is not None:
            similarity[np.arange(len(similarity)), skip[start : start + AT_ONCE]] = -np.inf
        found.append(np.argsort(-similarity, axis=1, kind="stable")[:, : min(count, left)])
    return np.concatenate(found)


def matches(first: Patches, second: Patches, count: int = MATCHES) -> list[Match]:
    """The pairs of patches that make two images similar.

    With tokens t, u of unit length and MIL weights a, b, the pair (i, j) counts a_i b_j (t_i . u_j): its part of the
    cosine of two bags of such tokens. Pairs are taken greedily, each patch once, while they count more than 0.

    Args:
        first: one image (N = 1).
        second: one image.
        count: the most pairs.

    Returns:
        Most important first; `share` is the pair's part of the sum over all pairs that count more than 0.
    """
    cosine = _unit(first.tokens[0]) @ _unit(second.tokens[0]).T  # [P, P]
    value = first.mil_weights[0][:, None].astype(np.float64) * second.mil_weights[0][None] * cosine
    total, found = value[value > 0].sum(), []
    while len(found) < count and value.size and value.max() > 0:
        i, j = np.unravel_index(np.argmax(value), value.shape)
        found.append(Match(int(i), int(j), float(cosine[i, j]), float(value[i, j] / total)))
        value[i], value[:, j] = 0, 0
    return found


def _unit(tokens: np.ndarray) -> np.ndarray:
    return tokens / np.maximum(np.linalg.norm(tokens, axis=-1, keepdims=True), 1e-12)
