"""Similarity of features: nearest images, patches that match, a map of the images, and colours of their patches."""

from typing import NamedTuple

import numpy as np

MATCHES = 5
AT_ONCE = 64  # queries
MAP_NEEDS = 10  # images; with fewer, neighbourhoods say nothing and the map is a PCA
PERPLEXITY = 30.0
TAILS = (2, 98)  # percentiles of a component that become black and full colour


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
    """Finds the most similar gallery images of each of Q images, most similar first.

    Args:
        features: [Q, F], l2-normalised.
        gallery: [M, F], l2-normalised.
        count: how many.
        skip: [Q] row of the gallery that is the image itself; None: it is not in the gallery.

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


def matches(
    tokens: np.ndarray, weights: np.ndarray, others: np.ndarray, other_weights: np.ndarray, count: int = MATCHES
) -> list[Match]:
    """Finds the pairs of patches that make two images similar.

    With tokens t, u of unit length and MIL weights a, b, the pair (i, j) counts a_i b_j (t_i . u_j): its part of the
    cosine of two bags of such tokens. Pairs are taken greedily, each patch once, while they count more than 0.

    Args:
        tokens: [P, D] of the first image.
        weights: [P] its MIL weights.
        others: [P, D] of the second image.
        other_weights: [P] its MIL weights.
        count: the most pairs.

    Returns:
        Most important first; `share` is the pair's part of the sum over all pairs that count more than 0.
    """
    unit = lambda rows: rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
    cosine = unit(tokens) @ unit(others).T  # [P, P]
    value = weights[:, None].astype(np.float64) * other_weights[None] * cosine
    total, found = value[value > 0].sum(), []
    while len(found) < count and value.size and value.max() > 0:
        i, j = np.unravel_index(np.argmax(value), value.shape)
        found.append(Match(int(i), int(j), float(cosine[i, j]), float(value[i, j] / total)))
        value[i], value[:, j] = 0, 0
    return found


def feature_map(features: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    """Maps images so that similar features lie close together; the same features and seed give the same map.

    Args:
        features: [N, F] float, l2-normalised.
        seed: of t-SNE.

    Returns:
        [N, 2] float32 within -1..1, and how it was made.
    """
    from sklearn.manifold import TSNE  # imported here: it takes a second, and only the end of a run needs it
    from threadpoolctl import threadpool_limits

    count = len(features)
    if count < MAP_NEEDS or not np.ptp(features, axis=0).any():
        places, how = principal(features, 2)[0], "PCA"
    else:
        perplexity = min(PERPLEXITY, (count - 1) / 3)
        tsne = TSNE(2, perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed)
        with threadpool_limits(1):  # threads that wait for each other are slower on busy cores, and add up in any order
            places = tsne.fit_transform(features.astype(np.float32))
        how = f"t-SNE, perplexity {perplexity:.3g}, PCA start, seed {seed}"
    places = places - (places.max(axis=0) + places.min(axis=0)) / 2
    return (places / max(np.abs(places).max(), 1e-12)).astype(np.float32), how


def patch_colours(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shows the first three principal components of all patches of all images together as red, green and blue.

    Args:
        tokens: [N, P, D].

    Returns:
        [N, P, 3] float32 in 0..1, and the share of the variance of each component [3], in 0..1.
    """
    scores, shares = principal(tokens.reshape(-1, tokens.shape[-1]), 3)
    low, high = np.percentile(scores, TAILS, axis=0)
    span = np.where(high > low, high - low, 1)
    colours = np.where(high > low, np.clip((scores - low) / span, 0, 1), 0.5)
    return colours.reshape(*tokens.shape[:2], 3).astype(np.float32), shares


def principal(rows: np.ndarray, components: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes principal components, each with the sign that makes its largest loading positive.

    Args:
        rows: [N, D].
        components: C; those beyond the rank of the data are 0.

    Returns:
        Scores [N, C] float64 and shares of the variance [C].
    """
    from sklearn.decomposition import PCA

    scores, shares = np.zeros((len(rows), components)), np.zeros(components)
    if not np.ptp(rows, axis=0).any():
        return scores, shares
    kept = min(components, *rows.shape)
    pca = PCA(kept, svd_solver="full")
    scores[:, :kept] = pca.fit_transform(rows.astype(np.float64))
    shares[:kept] = pca.explained_variance_ratio_
    largest = np.argmax(np.abs(pca.components_), axis=1)
    scores[:, :kept] *= np.sign(pca.components_[np.arange(kept), largest])
    return scores, shares
