"""Which classes are told apart, and which are taken for which."""

from typing import NamedTuple

import numpy as np

PAIRS = 50  # that are kept; the tail is single images


class Confusion(NamedTuple):
    """Test images of one class that were taken for another.

    Attributes:
        true: the class.
        predicted: the other.
        count: of images.
        percent: of the test images of the class.
    """

    true: str
    predicted: str
    count: int
    percent: float


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


def class_table(of_class: dict[str, float]) -> str:
    """Accuracy of every class, worst first."""
    ordered = sorted(of_class.items(), key=lambda item: item[1])
    return "\n".join(["top-1 by class, percent"] + [f"  {value:6.1f}  {name}" for name, value in ordered])


def confusion_table(pairs: list[Confusion], lines: int = 10) -> str:
    """The first pairs as text."""
    head = "most confused: images, percent of the class, class -> prediction"
    return "\n".join([head] + [f"  {p.count:4}  {p.percent:5.1f}  {p.true} -> {p.predicted}" for p in pairs[:lines]])
