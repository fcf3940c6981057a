"""High-dimensional features made visible: a map of the images, and colours of their patches."""

import numpy as np

MAP_NEEDS = 10  # images; with fewer, neighbourhoods say nothing and the map is a PCA
PERPLEXITY = 30.0
TAILS = (2, 98)  # percentiles of a component that become black and full colour


def feature_map(features: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    """A map on which images with similar features lie close together; the same features and seed give the same map.

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
    """The first three principal components of all patches of all images together, as red, green and blue.

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
    """Principal components, each with the sign that makes its largest loading positive.

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
