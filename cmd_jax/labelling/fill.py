"""Labels of a few images -> classes of all: the nearest class mean, with the probability that it is right.

The nearest mean of unit features is the prototype classifier of few-shot learning (Snell, Swersky, Zemel, NeurIPS 2017). The
means are those of the labelled images and, by their shares, of all others (soft k-means from labelled seeds: Ren et al., ICLR
2018). The probability is calibrated on the labelled images, each classified without its own label (Platt, 1999): one whose
class has no other labelled image is wrong there, which stands for the classes that nobody has named yet.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cmd_jax.labelling.features import directions, unit

STEPS = 3  # of soft k-means
SHARPNESS = 10.0  # of the shares: softmax of this times the cosine
FOLDS = 5  # of the labelled images, for the probability
MISSING = -2.0  # below any cosine


class Filled(NamedTuple):
    """The classes of all images.

    Attributes:
        classes: [N] of the labels' type.
        probability: [N] float64 that the class is right; 1 for labelled images, 0 where all classes are ruled out.
        nearest: [N] int64, the most similar labelled image of that class; a labelled image itself.
    """

    classes: np.ndarray
    probability: np.ndarray
    nearest: np.ndarray


def fill_in(
    features: np.ndarray,
    labelled: Sequence[int] | np.ndarray,
    labels: Sequence | np.ndarray,
    ruled_out: Mapping[int, Collection] | None = None,
) -> Filled:
    """Gives every image the class whose mean direction is nearest.

    Args:
        features: [N, F] float, one row an image.
        labelled: [L] different rows that an expert labelled; L is at least 1.
        labels: [L] their classes, numbers or words.
        ruled_out: classes that images are not of, by row.
    """
    labelled = np.asarray(labelled, np.int64)
    names, of = np.unique(np.asarray(labels), return_inverse=True)
    rows, allowed = directions(features), _allowed(len(features), names, ruled_out or {})
    cosines = _cosines(rows, labelled, of, allowed)
    found = np.argmax(cosines, axis=1)
    found[labelled] = of
    held_out, fold = np.empty((len(of), len(names)), np.float32), np.empty(len(of), np.int64)
    fold[np.argsort(of, kind="stable")] = np.arange(len(of)) % FOLDS  # the images of a class are in different ones
    for number in range(min(FOLDS, len(of))):
        out = fold == number
        held_out[out] = _cosines(rows, labelled[~out], of[~out], allowed)[labelled[out]]
    right = (np.argmax(held_out, axis=1) == of) & (held_out.max(axis=1) > MISSING)
    probability = _calibrated(_evidence(held_out), right, _evidence(cosines)).astype(np.float64)
    probability[~allowed.any(axis=1)] = 0
    probability[labelled] = 1
    similarity = np.where(found[:, None] == of, rows @ rows[labelled].T, MISSING)  # [N, L]
    nearest = labelled[np.argmax(similarity, axis=1)]
    nearest[labelled] = labelled
    return Filled(names[found], probability, nearest)


def classes_of(features: np.ndarray, labelled: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`fill_in(...).classes` alone, without the time that the probability takes."""
    names, of = np.unique(labels, return_inverse=True)
    cosines = _cosines(directions(features), labelled, of, np.ones((len(features), len(names)), bool))
    found = np.argmax(cosines, axis=1)
    found[labelled] = of
    return names[found]


def _allowed(count: int, names: np.ndarray, ruled_out: Mapping[int, Collection]) -> np.ndarray:
    """[N, C] bool: what nobody has ruled out."""
    allowed = np.ones((count, len(names)), bool)
    for row, not_these in ruled_out.items():
        allowed[row] = ~np.isin(names, list(not_these))
    return allowed


def _cosines(rows: np.ndarray, labelled: np.ndarray, of: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Cosines to the class means after STEPS of soft k-means from the labelled images.

    Args:
        rows: [N, F] float32 of unit norm.
        labelled: [L] of them.
        of: [L] int, their classes.
        allowed: [N, C] bool.

    Returns:
        [N, C] float32; MISSING where a class is not allowed or has no labelled image.
    """
    seeds = np.zeros(allowed.shape, np.float32)
    seeds[labelled, of] = 1
    possible = allowed & seeds.any(axis=0)
    shares = seeds
    for step in range(STEPS + 1):
        cosines = np.where(possible, rows @ unit(shares.T @ rows).T, MISSING)
        if step < STEPS:
            shares = np.where(possible, np.exp(SHARPNESS * cosines), 0)
            shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1e-12)
            shares[labelled] = seeds[labelled]
    return cosines


def _evidence(cosines: np.ndarray) -> np.ndarray:
    """[N, C] -> [N, 2]: the largest cosine, and how far the second lies below it."""
    if cosines.shape[1] < 2:
        return np.repeat(cosines, 2, axis=1)
    second, first = np.sort(cosines, axis=1)[:, -2:].T
    return np.stack([first, first - np.maximum(second, -1)], axis=1)


def _calibrated(evidence: np.ndarray, right: np.ndarray, of_all: np.ndarray) -> np.ndarray:
    """Logistic regression of whether held-out answers are right: ([L, 2], [L] bool, [N, 2]) -> [N] probabilities."""
    if right.all() or not right.any():  # nothing to fit; Laplace's rule
        return np.full(len(of_all), (right.sum() + 1) / (len(right) + 2))
    from sklearn.linear_model import LogisticRegression  # half a second to import
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression()).fit(evidence, right).predict_proba(of_all)[:, 1]
