"""Images whose class their neighbours in feature space doubt, by a threshold that planted errors have set.

Every image gets the probability of its class from a linear discriminant that has not seen it (confident learning: Northcutt,
Jiang, Chuang, JAIR 2021). How small is too small is measured: a share of the labels is changed at random, and the threshold is
the largest at which half of what lies below it was planted.
"""

from typing import NamedTuple

import numpy as np

FOLDS = 5
SHRINKAGE = 0.3  # of the covariance towards a multiple of the identity: features are many, images of a class few
PLANTED = 0.05
PRECISION = 0.5  # of what is below the threshold, among planted errors


class Suspects(NamedTuple):
    """Images that may be in the wrong class.

    Attributes:
        rows: [S] int64, the most suspicious first.
        other: [S] the class that is most probable instead.
        probability: [S] float64, of the class that they have.
        precision: share of the images below the threshold that were planted errors.
        recall: share of the planted errors that lay below it.
    """

    rows: np.ndarray
    other: np.ndarray
    probability: np.ndarray
    precision: float
    recall: float


def find_mislabels(features: np.ndarray, classes: np.ndarray, seed: int = 0) -> Suspects:
    """Finds images that are probably of another class.

    Args:
        features: [N, F] float.
        classes: [N] texts or numbers.
        seed: of the folds and of the planted errors.
    """
    names, labels = np.unique(classes.astype(str), return_inverse=True)
    none = Suspects(np.zeros(0, np.int64), np.zeros(0, names.dtype), np.zeros(0), 0.0, 0.0)
    if len(names) < 2 or len(labels) < 4 * len(names):
        return none
    planted, bad = plant(labels, seed)
    own, _ = held_out(features, planted, seed)
    threshold, precision, recall = _threshold(own, bad)
    own, other = held_out(features, labels, seed)
    rows = np.nonzero(own < threshold)[0]
    rows = rows[np.argsort(own[rows], kind="stable")]
    return Suspects(rows, names[other[rows]], own[rows], precision, recall)


def plant(labels: np.ndarray, seed: int, share: float = PLANTED) -> tuple[np.ndarray, np.ndarray]:
    """Labels [N] of which a share is changed to another one at random, and which these are, [N] bool."""
    rng, classes = np.random.default_rng(seed), labels.max() + 1
    bad = np.zeros(len(labels), bool)
    bad[rng.choice(len(labels), max(1, round(share * len(labels))), replace=False)] = True
    changed = labels.copy()
    changed[bad] = (labels[bad] + rng.integers(1, classes, bad.sum())) % classes
    return changed, bad


def held_out(features: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probability of its label for every image, by discriminants that have not seen it, and the most probable other label.

    Args:
        features: [N, F] float.
        labels: [N] int from 0 on.
        seed: of the folds.

    Returns:
        ([N] float64, [N] int64). An image whose label no other fold has gets 1.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis  # half a second to import
    from sklearn.model_selection import KFold

    own, other = np.ones(len(labels)), labels.astype(np.int64).copy()
    for train, test in KFold(FOLDS, shuffle=True, random_state=seed).split(features):
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE).fit(features[train], labels[train])
        probability = model.predict_proba(features[test])
        column = np.searchsorted(model.classes_, labels[test]).clip(max=len(model.classes_) - 1)
        known = model.classes_[column] == labels[test]
        place = np.arange(len(test))[known], column[known]
        own[test[known]] = probability[place]
        probability[place] = -1
        other[test] = model.classes_[np.argmax(probability, axis=1)]
    return own, other


def _threshold(own: np.ndarray, bad: np.ndarray) -> tuple[float, float, float]:
    """The largest probability below which at least PRECISION of the images are bad; precision and recall there."""
    order = np.argsort(own, kind="stable")
    found = np.cumsum(bad[order])
    precision = found / np.arange(1, len(own) + 1)
    enough = np.nonzero(precision >= PRECISION)[0]
    if not len(enough):
        return 0.0, 0.0, 0.0
    last = enough[-1]
    return float(np.nextafter(own[order[last]], 2)), float(precision[last]), float(found[last] / bad.sum())
