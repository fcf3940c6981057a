"""What a protocol reads, and the rows that it gives."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from cmd_jax.config import ConfigDict
from cmd_jax.evaluation.bootstrap import interval
from cmd_jax.evaluation.features import Features
from cmd_jax.evaluation.splits import Splits
from cmd_jax.models.build import Params
from cmd_jax.models.network import Network


class Row(NamedTuple):
    """One number.

    Attributes:
        key: in metrics.json.
        title: for people.
        value: the number.
        protocol: how it was measured.
        unit: "percent", or "" for a number without one.
        low: lower end of its 95 % interval; None where none is computed.
        high: upper end.
    """

    key: str
    title: str
    value: float
    protocol: str
    unit: Literal["percent", ""] = "percent"
    low: float | None = None
    high: float | None = None


class Neighbours(NamedTuple):
    """The k most similar gallery items of each query, most similar first; of equal ones the first in the gallery comes first.

    Attributes:
        similarity: [Q, k] float32 dot products, cosines of l2-normalised features.
        index: [Q, k] int32, rows of the gallery.
    """

    similarity: np.ndarray
    index: np.ndarray


class Cost(NamedTuple):
    """What a part of an evaluation does, said before it starts.

    Attributes:
        work: for people.
        calls: how often it calls `between`, each before one unit of work.
        unit: name of that.
        flops: floating-point operations, roughly.
    """

    work: str
    calls: int
    unit: str
    flops: float


class EvalInputs(NamedTuple):
    """A teacher and the images to measure it on.

    Attributes:
        config: resolved.
        network: of the teacher.
        teacher: parameters, on every device of this process.
        splits: sources of training and test images.
        gallery: features of the training images.
        queries: features of the test images; None where there are no labels.
        neighbours: training images next to each test image, for the largest k of `eval.knn_k`; None where there are no labels.
        between: called before every batch and every fit, in all processes equally often.
    """

    config: ConfigDict
    network: Network
    teacher: Params
    splits: Splits
    gallery: Features
    queries: Features | None
    neighbours: Neighbours | None
    between: Callable[[], None]

    def classes(self) -> int:
        return len(self.splits.train.class_names)

    def counts(self) -> str:
        """Of the images, for protocols."""
        return f"{len(self.queries.labels):,} test queries, {len(self.gallery.labels):,} train images"

    def features(self) -> str:
        """What was measured, for protocols."""
        return f"{self.config.eval.features} features at {self.config.eval.crop_px} px"


def percent_row(key: str, title: str, of_images: np.ndarray, protocol: str, seed: int) -> Row:
    """The mean of a number of every test image, in percent, with its bootstrap interval.

    Args:
        key: of the row.
        title: of the row.
        of_images: [Q] in 0..1 (bool, or an average precision).
        protocol: of the row.
        seed: of the bootstrap.
    """
    low, high = interval(of_images, seed)
    return Row(key, title, 100 * float(np.mean(of_images)), protocol, low=100 * low, high=100 * high)
