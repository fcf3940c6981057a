"""Retrieval as CMD reports it: test images as queries, training images as the gallery, ranked by cosine similarity."""

from typing import NamedTuple

import numpy as np

QUERIES_AT_ONCE = 512
AP_RANKS = 100
QUERY_EVERY = 9  # of the test items in `ratio_split`


class RetrievalResult(NamedTuple):
    """Percentages.

    Attributes:
        rank1: share of queries whose nearest gallery item has their class.
        rank5: share with such an item among the five nearest.
        map_at_100: mean of the average precision over the first 100 ranks, divided by the relevant items found there.
        map_full: mean of the average precision over the whole ranking.
    """

    rank1: float
    rank5: float
    map_at_100: float
    map_full: float


def average_precision(relevant: np.ndarray) -> np.ndarray:
    """Mean over a ranking's relevant items of the precision at their rank; 0 where there is none.

    Args:
        relevant: [Q, M] bool in ranked order.

    Returns:
        [Q] float64.
    """
    hits = np.cumsum(relevant, axis=1)
    precision = hits / np.arange(1, relevant.shape[1] + 1)
    return np.sum(precision * relevant, axis=1) / np.maximum(1, hits[:, -1])


def ratio_split(
    gallery: np.ndarray, gallery_labels: np.ndarray, queries: np.ndarray, query_labels: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """CMD's other split: every ninth test item is a query, the remaining ones join the gallery behind the training items.

    Args:
        gallery: [M, F] training features.
        gallery_labels: [M] int.
        queries: [Q, F] test features.
        query_labels: [Q] int.

    Returns:
        ((gallery features, labels), (query features, labels)).
    """
    chosen = np.arange(len(queries)) % QUERY_EVERY == 0
    joined = (np.concatenate(parts) for parts in ((gallery, queries[~chosen]), (gallery_labels, query_labels[~chosen])))
    return tuple(joined), (queries[chosen], query_labels[chosen])


def retrieval(
    gallery: np.ndarray, gallery_labels: np.ndarray, queries: np.ndarray, query_labels: np.ndarray
) -> RetrievalResult:
    """Ranks the gallery for every query by dot product (cosine when features are l2-normalised).

    Args:
        gallery: [M, F].
        gallery_labels: [M] int.
        queries: [Q, F].
        query_labels: [Q] int.
    """
    totals = np.zeros(4)
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        rows = slice(start, start + QUERIES_AT_ONCE)
        order = np.argsort(-(queries[rows] @ gallery.T), axis=1, kind="stable")
        relevant = gallery_labels[order] == query_labels[rows, None]
        totals += (
            relevant[:, 0].sum(),
            relevant[:, :5].any(axis=1).sum(),
            average_precision(relevant[:, :AP_RANKS]).sum(),
            average_precision(relevant).sum(),
        )
    return RetrievalResult(*(100 * totals / len(queries)).tolist())
