"""Labels of some images to suggestions for all others: class, calibrated probability, nearest labelled image, or unknown."""

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cmd_jax.errors import ConfigError
from cmd_jax.labelling.fill import fill_in

UNKNOWN = 0.25  # probability of being right below which no named class is believed
BINS = 15  # of the expected calibration error (Guo, Pleiss, Sun, Weinberger, ICML 2017)
COLUMNS = ("file", "class", "probability", "unknown", "nearest")


class Suggestions(NamedTuple):
    """What the labels say of all N images.

    Attributes:
        classes: [N] texts, the most probable class; of a labelled image its label.
        probability: [N] float64 that it is right, calibrated on the labelled images; 1 of those.
        nearest: [N] int64, the labelled image of that class that is most similar.
        unknown: [N] bool, that no named class is believed: it may be of one that nobody has named.
    """

    classes: np.ndarray
    probability: np.ndarray
    nearest: np.ndarray
    unknown: np.ndarray


class Agreement(NamedTuple):
    """Suggestions beside the truth, over images without a label.

    Attributes:
        images: number of them.
        accuracy: share of right classes.
        calibration_error: expected difference of probability and accuracy in BINS bins.
    """

    images: int
    accuracy: float
    calibration_error: float


def suggest(
    features: np.ndarray, labels: Sequence[str | None], ruled_out: Mapping[int, Collection[str]] | None = None
) -> Suggestions:
    """Fills in the labels of all images.

    Args:
        features: [N, F] float.
        labels: [N] names; None or "" where there is none yet.
        ruled_out: names that images are not of, by row: none of them is suggested there.

    Raises:
        ConfigError: there are not as many labels as images, or none at all.
    """
    if len(labels) != len(features):
        raise ConfigError(f"there are {len(labels)} labels for {len(features)} images; give one for each, None where unknown")
    labelled = np.array([row for row, label in enumerate(labels) if label], np.int64)
    if not len(labelled):
        raise ConfigError("no image has a label; name some first, as groups(...) sorts them")
    names = np.array([labels[row] for row in labelled], object).astype(str)
    filled = fill_in(features, labelled, names, ruled_out)
    return Suggestions(filled.classes, filled.probability, filled.nearest, filled.probability < UNKNOWN)


def agreement(suggestions: Suggestions, labelled: np.ndarray, truth: np.ndarray) -> Agreement | None:
    """Compares suggestions with class folders.

    Args:
        suggestions: of N images.
        labelled: [N] bool.
        truth: [N] texts; "" where it is not known. A class may have another name there than experts gave it: it is the folder
            that most images of that name lie in.

    Returns:
        None where no image has a truth and no label.
    """
    of = {}
    for name in np.unique(suggestions.classes[labelled]):
        folders, counts = np.unique(truth[labelled & (suggestions.classes == name)].astype(str), return_counts=True)
        of[name] = folders[np.argmax(counts)]
    rows = np.nonzero(~labelled & (truth != ""))[0]
    if not len(rows):
        return None
    right = np.array([of[suggestions.classes[row]] == truth[row] for row in rows], np.float64)
    return Agreement(len(rows), float(right.mean()), calibration_error(suggestions.probability[rows], right))


def calibration_error(probability: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: sum over bins of (share of images) x |mean of right - mean of probability|, both [N]."""
    places = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(places, right - probability, minlength=BINS)
    return float(np.abs(gaps).sum() / len(right))


def to_csv(suggestions: Suggestions, paths: list[str], rows: np.ndarray) -> str:
    """A table of the suggestions for some rows."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(COLUMNS)
    for row in rows:
        known = (suggestions.classes[row], f"{suggestions.probability[row]:.4f}", "yes" if suggestions.unknown[row] else "")
        table.writerow((paths[row], *known, paths[suggestions.nearest[row]]))
    return out.getvalue()
