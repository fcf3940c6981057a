"""Which images the teacher holds for similar, and which patches make them so."""

from typing import Any, NamedTuple

import numpy as np

from cmd_jax.evaluation.features import Features
from cmd_jax.evaluation.patches import Patches

NEIGHBOURS = 6
MATCHES = 5


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
    similarity = features @ gallery.T
    if skip is not None:
        similarity[np.arange(len(similarity)), skip] = -np.inf
    left = gallery.shape[0] - (skip is not None)
    return np.argsort(-similarity, axis=1, kind="stable")[:, : min(count, left)]


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


def explorer(
    queries: Features, gallery: Features, chosen: np.ndarray, found: np.ndarray, patches: tuple[Patches, Patches], name: Any
) -> list[dict[str, Any]]:
    """What the page shows of each query: its neighbours, and how their patches match.

    Args:
        queries: of the images to choose queries from.
        gallery: of the images that are found.
        chosen: [Q] rows of `queries`.
        found: [Q, K] rows of `gallery`, nearest first.
        patches: of the chosen queries [Q], and of the gallery images np.unique(found).
        name: label -> name of the class.

    Returns:
        For each query its row, title, class, whether the first neighbour's class is right (None without labels), and
        neighbours: row, title, class, similarity, right, matches.
    """
    place = {row: number for number, row in enumerate(np.unique(found).tolist())}
    rows = []
    for number, query in enumerate(chosen.tolist()):
        near = []
        for other in found[number].tolist():
            pairs = matches(patches[0].take([number]), patches[1].take([place[other]]))
            near.append(
                {
                    "row": other,
                    "title": short(gallery.names[other]),
                    "class": name(gallery.labels[other]),
                    "similarity": float(gallery.features[other] @ queries.features[query]),
                    "right": _same(queries.labels[query], gallery.labels[other]),
                    "matches": [match._asdict() for match in pairs],
                }
            )
        of_query = {"row": query, "title": short(queries.names[query]), "class": name(queries.labels[query])}
        rows.append({**of_query, "right": near[0]["right"] if near else None, "neighbours": near})
    return rows


def short(name: str) -> str:
    """The last two parts of a path: enough to find an image, and nothing about the machine."""
    return "/".join(name.replace("\\", "/").split("/")[-2:])


def _same(a: int, b: int) -> bool | None:
    return None if a < 0 else bool(a == b)
