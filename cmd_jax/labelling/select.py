"""Which images an expert should label next: those that stand for the most images that nothing stands for yet.

Greedy facility location (Nemhauser, Wolsey, Fisher, 1978; for active learning Wei, Iyer, Bilmes, ICML 2015) on the graph of the
nearest neighbours. An image covers itself by 1 and a neighbour by exp(-distance / scale); the next image is the one that adds
most to the sum over images of the best cover. It lies where images are many, away from those that are chosen or labelled, and a
near double of one of these adds nothing.
"""

import heapq
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from cmd_jax.labelling.features import directions, nearest

NEIGHBOURS = 20
SCALE = 0.25  # of the median distance to the last of the neighbours
CERTAINTY = 4  # power of the probability


def choose_images(
    features: np.ndarray,
    count: int,
    labelled: Sequence[int] | np.ndarray = (),
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Chooses images to label, the most telling first; the same for the same arguments.

    Args:
        features: [N, F] float, one row an image.
        count: how many; of fewer unlabelled images all are returned.
        labelled: rows that have a label: they cover their neighbours already, and are not chosen.
        weights: [N] what covering each image is worth, at least 0, for example `worth`; None: all the same.

    Returns:
        [count] int64 rows, in the order in which to ask. A prefix is what a smaller count returns.
    """
    labelled = np.asarray(labelled, np.int64)
    weights = np.ones(len(features)) if weights is None else np.asarray(weights, np.float64)
    cover = np.zeros(len(features))
    columns = covers(features)

    def of(image: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(columns.indptr[image], columns.indptr[image + 1])
        return columns.indices[part], columns.data[part]

    def gain(image: int) -> float:
        rows, values = of(image)
        return float(weights[rows] @ np.maximum(values - cover[rows], 0))

    def add(image: int) -> None:
        rows, values = of(image)
        cover[rows] = np.maximum(cover[rows], values)

    for image in labelled.tolist():
        add(image)
    waiting = np.setdiff1d(np.arange(len(features)), labelled).tolist()
    # Lazy greedy (Minoux, 1978): a gain never grows, so one that is still the largest after an update is the largest of all.
    heap = [(-gain(image), image) for image in waiting]
    heapq.heapify(heap)
    chosen: list[int] = []
    while heap and len(chosen) < count:
        _, image = heapq.heappop(heap)
        entry = (-gain(image), image)
        if heap and entry > heap[0]:
            heapq.heappush(heap, entry)
            continue
        add(image)
        chosen.append(image)
    return np.array(chosen, np.int64)


def worth(probability: np.ndarray) -> np.ndarray:
    """What covering an image is worth once some are labelled: [N] `fill_in(...).probability` -> [N], 1 - p^4.

    Little is taken from an image before its class is nearly certain: with few labels nothing is, and covering the images
    alone is better than asking where the answer is doubtful (docs/evaluation.md has the numbers).
    """
    return 1 - np.asarray(probability) ** CERTAINTY


def covers(features: np.ndarray) -> sparse.csc_array:
    """How well each image stands for others: [N, F] -> sparse [N, N], symmetric, 1 for itself.

    Entries are exp(-(1 - cosine) / (SCALE x m)) for pairs of which one is among the NEIGHBOURS nearest of the other; m is the
    median over images of 1 - cosine to the last of these, so that the unit of the distances is that of the features.
    """
    images = len(features)
    index, similarity = nearest(directions(features), NEIGHBOURS)
    distance = np.maximum(1 - similarity.astype(np.float64), 0)
    distance[index == np.arange(images)[:, None]] = 0
    scale = max(SCALE * float(np.median(distance.max(axis=1))), 1e-12)
    rows = np.repeat(np.arange(images), index.shape[1])
    directed = sparse.csr_array((np.exp(-distance / scale).ravel(), (rows, index.ravel())), shape=(images, images))
    return directed.maximum(directed.T).tocsc()
