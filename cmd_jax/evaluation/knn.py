"""Weighted k-nearest-neighbour classification of DINO (`eval_knn.py` of the references)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.evaluation.devices import by_query, chunks, in_chunks
from cmd_jax.evaluation.protocol import Cost, EvalInputs, Neighbours, percent_number
from cmd_jax.metrics import Confusion, Number

HEADLINE_K = 20  # of the predictions that breakdowns and pictures show; the one that DINO found best for most of its runs
TOP = 5
PAIRS = 50  # of confused classes that are kept; the tail is single images


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


def nearest(gallery: np.ndarray, queries: np.ndarray, k: int, poll: Callable[[], None] = lambda: None) -> Neighbours:
    """Finds the nearest gallery items on the devices; any smaller k reads its first columns.

    Args:
        gallery: [M, F] float, l2-normalised.
        queries: [Q, F] float, l2-normalised.
        k: number of neighbours; at most M are found.
        poll: called before every chunk of queries.
    """
    gallery, queries = (np.asarray(features, np.float32) for features in (gallery, queries))
    return Neighbours(*in_chunks(_top(min(k, len(gallery))), (gallery,), (queries,), poll))


@functools.cache
def _top(k: int) -> Callable:
    def top(gallery: tuple[jax.Array], queries: tuple[jax.Array]) -> list[jax.Array]:
        return jax.lax.top_k(jnp.matmul(queries[0], gallery[0].T, precision="highest"), k)

    return by_query(top)


def knn_votes(neighbours: Neighbours, gallery_labels: np.ndarray, *, k: int, temp: float, classes: int) -> np.ndarray:
    """Votes of the k most similar gallery items, each exp(similarity / temp) for its class.

    Args:
        neighbours: of the queries.
        gallery_labels: [M] int.
        k: number of neighbours that vote; at most as many as were found.
        temp: temperature.
        classes: number of classes C.

    Returns:
        [Q, C] float64.
    """
    similarity, index = (array[:, :k] for array in neighbours)
    place = np.arange(len(index))[:, None] * classes + gallery_labels[index]
    weight = np.exp(similarity.astype(np.float64) / temp)
    return np.bincount(place.ravel(), weight.ravel(), minlength=len(index) * classes).reshape(len(index), classes)


def knn_classify(
    neighbours: Neighbours,
    gallery_labels: np.ndarray,
    query_labels: np.ndarray,
    *,
    k: int,
    temp: float,
    classes: int,
) -> KNNResult:
    """Top-1 and top-5 accuracy of `knn_votes`; a class without a vote is never an answer."""
    votes = knn_votes(neighbours, gallery_labels, k=k, temp=temp, classes=classes)
    voted, rows = np.sum(votes > 0, axis=1), np.arange(len(votes))
    ranked = np.empty((len(votes), min(TOP, classes)), np.int64)
    right = np.empty(ranked.shape, bool)
    for rank in range(ranked.shape[1]):  # of equal votes the first class
        best = ranked[:, rank] = np.argmax(votes, axis=1)
        right[:, rank] = (best == query_labels) & (votes[rows, best] > 0)
        votes[rows, best] = -1
    found = right.any(axis=1)
    open_top5 = int(np.sum(~found & (voted < TOP)))
    return KNNResult(
        100 * float(np.mean(right[:, 0])), 100 * float(np.mean(found)), ranked[:, 0], open_top5, right[:, 0], found
    )


def neighbours_cost(gallery: np.ndarray, queries: np.ndarray) -> Cost:
    """Of `nearest`: [M, F] and [Q, F]."""
    (images, width), count = gallery.shape, len(queries)
    work = f"{count:,} queries, {images:,} train images, {width:,} features"
    return Cost(work, chunks(count), "chunks", 2.0 * count * images * width)


def cost(inputs: EvalInputs) -> Cost:
    """Of `measure`: votes alone."""
    return Cost(f"votes of {len(inputs.queries.labels):,} queries", 0, "", 0.0)


def measure(inputs: EvalInputs) -> list[Number]:
    """Top-1 and top-5 for every `eval.knn_k` that there are training images for."""
    images, asked = len(inputs.gallery.labels), sorted(set(inputs.config.eval.knn_k))
    chosen = [k for k in asked if k <= images]
    left_out = f"; k={', '.join(str(k) for k in asked if k > images)} left out, there are {images} train images"
    note = left_out if len(chosen) < len(asked) else ""
    found = []
    for k in chosen or asked[:1]:
        result = classify(inputs, k)
        measured = f"k={k}" if k <= images else f"k={images}, all there are"
        protocol = f"{measured}, T={inputs.config.eval.knn_temp}, {inputs.features()}, {inputs.counts()}"
        seed = inputs.config.seed
        chance = f"; chance {100 / inputs.classes():.1f}"
        found.append(percent_number(f"knn{k}_top1", f"k-NN top-1 (k={k})", result.right1, protocol + chance + note, seed))
        found.append(Number(f"knn{k}_top5", f"k-NN top-5 (k={k})", result.top5, protocol + note))
    return found


def classify(inputs: EvalInputs, k: int) -> KNNResult:
    """`knn_classify` of the test images."""
    return knn_classify(
        inputs.neighbours,
        inputs.gallery.labels,
        inputs.queries.labels,
        k=k,
        temp=inputs.config.eval.knn_temp,
        classes=inputs.classes(),
    )


def headline_k(asked: tuple[int, ...]) -> int:
    """The k of `eval.knn_k` that breakdowns show: 20 where it is among them, else the nearest."""
    return min(asked, key=lambda k: (abs(k - HEADLINE_K), k))


def per_class(predictions: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> dict[str, float]:
    """Class name -> percent of its test images that are right; classes without test images are left out.

    Args:
        predictions: [Q] int, classes.
        labels: [Q] int.
        names: of the classes.
    """
    right = predictions == labels
    return {name: 100 * float(np.mean(right[labels == label])) for label, name in enumerate(names) if np.any(labels == label)}


def confusions(predictions: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> list[Confusion]:
    """The pairs of classes that are confused most often: by images, then by share of the class, then in the classes' order.

    Args:
        predictions: [Q] int, classes.
        labels: [Q] int.
        names: of the classes.

    Returns:
        At most PAIRS of them.
    """
    wrong = predictions != labels
    pairs, counts = np.unique(np.stack([labels[wrong], predictions[wrong]], axis=1), axis=0, return_counts=True)
    percent = 100 * counts / np.bincount(labels, minlength=len(names))[pairs[:, 0]]
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -percent, -counts))[:PAIRS]
    return [Confusion(names[pairs[i, 0]], names[pairs[i, 1]], int(counts[i]), float(percent[i])) for i in order]
