"""Labels of a few images -> classes of all: the nearest class mean, with the probability that it is right.

The nearest mean of unit features is the prototype classifier of few-shot learning (Snell, Swersky, Zemel, NeurIPS 2017). The
probability is calibrated on the labelled images, each classified by the others (Platt, 1999): one whose class has no other
labelled image is wrong there, which stands for the classes that nobody has named yet.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cmd_jax.labelling.features import directions, unit

MISSING = -2.0  # below any cosine


class Filled(NamedTuple):
    """The classes of all images.

    Attributes:
        classes: [N] of the labels' type.
        probability: [N] float64 that the class is right; 1 for labelled images.
        nearest: [N] int64, the most similar labelled image of that class; a labelled image itself.
    """

    classes: np.ndarray
    probability: np.ndarray
    nearest: np.ndarray


def fill_in(features: np.ndarray, labelled: Sequence[int] | np.ndarray, labels: Sequence | np.ndarray) -> Filled:
    """Gives every image the class whose labelled images' mean direction is nearest.

    Args:
        features: [N, F] float, one row an image.
        labelled: [L] different rows that an expert labelled; L is at least 1.
        labels: [L] their classes, numbers or words.
    """
    labelled = np.asarray(labelled, np.int64)
    names, of = np.unique(np.asarray(labels), return_inverse=True)
    rows = directions(features)
    known = rows[labelled]
    sums = np.zeros((len(names), rows.shape[1]))
    np.add.at(sums, of, known)
    cosines = rows @ unit(sums).astype(np.float32).T  # [N, C]
    held_out = cosines[labelled]
    own = unit(sums[of] - known)  # each mean without the image itself
    alone = np.bincount(of)[of] < 2
    held_out[np.arange(len(of)), of] = np.where(alone, MISSING, np.sum(own * known, axis=1))
    found = np.argmax(cosines, axis=1)
    found[labelled] = of
    right = (np.argmax(held_out, axis=1) == of) & ~alone
    probability = _calibrated(_evidence(held_out), right, _evidence(cosines)).astype(np.float64)
    probability[labelled] = 1
    similarity = np.where(found[:, None] == of, rows @ known.T, MISSING)  # [N, L]
    nearest = labelled[np.argmax(similarity, axis=1)]
    nearest[labelled] = labelled
    return Filled(names[found], probability, nearest)


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
