"""Weighted k-nearest-neighbour classification of DINO (`eval_knn.py` of the references)."""

from typing import NamedTuple

import numpy as np

from cmd_jax.evaluation.protocol import Row, Subject, percent_row

QUERIES_AT_ONCE = 1024
HEADLINE_K = 20  # of the predictions that breakdowns and pictures show; the one that DINO found best for most of its runs


class KNNResult(NamedTuple):
    """Percentages of right answers, and the predicted class of each query [Q] int64.

    Attributes:
        open_top5: queries with fewer than five voted classes, none of them the right one: the reference fills its top five
            with arbitrary classes there, and so can be right by chance.
        right1: [Q] bool, whether the first class of a query is right.
        right5: [Q] bool, whether one of its first five is.
    """

    top1: float
    top5: float
    predictions: np.ndarray
    open_top5: int
    right1: np.ndarray
    right5: np.ndarray


def knn_votes(
    gallery: np.ndarray, gallery_labels: np.ndarray, queries: np.ndarray, *, k: int, temp: float, classes: int
) -> np.ndarray:
    """Votes of the k most similar gallery items, each exp(similarity / temp) for its class.

    Args:
        gallery: [M, F], l2-normalised.
        gallery_labels: [M] int.
        queries: [Q, F], l2-normalised.
        k: number of neighbours; at most M.
        temp: temperature.
        classes: number of classes C.

    Returns:
        [Q, C] float64.
    """
    k = min(k, len(gallery))
    votes = np.zeros((len(queries), classes))
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        similarity = queries[start : start + QUERIES_AT_ONCE] @ gallery.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        weight = np.exp(np.take_along_axis(similarity, nearest, axis=1).astype(np.float64) / temp)
        row = np.arange(start, start + len(similarity))[:, None]
        np.add.at(votes, (np.broadcast_to(row, nearest.shape), gallery_labels[nearest]), weight)
    return votes


def knn_classify(
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    *,
    k: int,
    temp: float,
    classes: int,
) -> KNNResult:
    """Top-1 and top-5 accuracy of `knn_votes`; a class without a vote is never an answer."""
    votes = knn_votes(gallery, gallery_labels, queries, k=k, temp=temp, classes=classes)
    ranked = np.argsort(-votes, axis=1, kind="stable")[:, :5]
    right = (ranked == query_labels[:, None]) & (np.take_along_axis(votes, ranked, axis=1) > 0)
    found = right.any(axis=1)
    open_top5 = int(np.sum(~found & (np.sum(votes > 0, axis=1) < 5)))
    return KNNResult(
        100 * float(np.mean(right[:, 0])), 100 * float(np.mean(found)), ranked[:, 0], open_top5, right[:, 0], found
    )


def rows(subject: Subject) -> list[Row]:
    """Top-1 and top-5 for every `eval.knn_k` that there are training images for."""
    images, asked = len(subject.gallery.labels), sorted(set(subject.config.eval.knn_k))
    chosen = [k for k in asked if k <= images]
    left_out = f"; k={', '.join(str(k) for k in asked if k > images)} left out, there are {images} train images"
    note = left_out if len(chosen) < len(asked) else ""
    found = []
    for k in chosen or asked[:1]:
        subject.between()
        result = classify(subject, k)
        measured = f"k={k}" if k <= images else f"k={images}, all there are"
        protocol = f"{measured}, T={subject.config.eval.knn_temp}, {subject.features()}, {subject.counts()}"
        seed = subject.config.seed
        chance = f"; chance {100 / subject.classes():.1f}"
        found.append(percent_row(f"knn{k}_top1", f"k-NN top-1 (k={k})", result.right1, protocol + chance + note, seed))
        found.append(Row(f"knn{k}_top5", f"k-NN top-5 (k={k})", result.top5, protocol + note))
    return found


def classify(subject: Subject, k: int) -> KNNResult:
    """`knn_classify` of the test images."""
    gallery, queries = subject.gallery, subject.queries
    return knn_classify(
        gallery.features,
        gallery.labels,
        queries.features,
        queries.labels,
        k=k,
        temp=subject.config.eval.knn_temp,
        classes=subject.classes(),
    )


def headline_k(asked: tuple[int, ...]) -> int:
    """The k of `eval.knn_k` that breakdowns show: 20 where it is among them, else the nearest."""
    return min(asked, key=lambda k: (abs(k - HEADLINE_K), k))
