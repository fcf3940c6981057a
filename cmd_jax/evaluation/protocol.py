"""What a protocol reads, how a number gets its interval, and what long parts of an evaluation print."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from cmd_jax.config import ConfigDict, token_px
from cmd_jax.evaluation.features import Features
from cmd_jax.evaluation.splits import Splits
from cmd_jax.metrics import Number
from cmd_jax.models.build import Params
from cmd_jax.models.network import Network
from cmd_jax.progress import Progress
from cmd_jax.training import processes

RESAMPLES = 1000
COVERAGE = 0.95
DRAWN_AT_ONCE = 2**22  # numbers that are drawn at a time
ANNOUNCED_FLOPS = 2e11  # a few seconds on two CPU cores


class Neighbours(NamedTuple):
    """The k most similar gallery items of each query, most similar first; of equal ones the first in the gallery comes first.

    Attributes:
        similarity: [Q, k] float32 dot products, cosines of l2-normalised features.
        index: [Q, k] int32, rows of the gallery.
    """

    similarity: np.ndarray
    index: np.ndarray


class Cost(NamedTuple):
    """The work of a part of an evaluation, printed before it starts.

    Attributes:
        work: for people.
        calls: how often it calls `poll`, each before one unit of work.
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
        poll: called before every batch and every fit, in all processes equally often.
    """

    config: ConfigDict
    network: Network
    teacher: Params
    splits: Splits
    gallery: Features
    queries: Features | None
    neighbours: Neighbours | None
    poll: Callable[[], None]

    def classes(self) -> int:
        return len(self.splits.train.class_names)

    def counts(self) -> str:
        """Of the images, for protocols."""
        return f"{len(self.queries.labels):,} test queries, {len(self.gallery.labels):,} train images"

    def features(self) -> str:
        """What was measured, for protocols."""
        return f"{self.config.eval.features} features at {self.config.eval.crop_px} px"


def interval(of_images: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % interval of a mean by the percentile bootstrap (Efron, 1979): 1,000 samples of the images, drawn with replacement.

    The training images stay as they are: the interval is that of other test images, not of another run.

    Args:
        of_images: [Q] numbers, one of each test image; Q is at least 1.
        seed: of the samples; the same for numbers that are compared with one another.

    Returns:
        (low, high), in the unit of the numbers.
    """
    from scipy import stats  # half a second to import

    values = np.asarray(of_images, np.float64)
    if len(values) < 2:  # has no spread, which scipy refuses
        return float(values[0]), float(values[0])
    batch = max(1, min(RESAMPLES, DRAWN_AT_ONCE // len(values)))
    rng = np.random.default_rng(seed)
    options = {"n_resamples": RESAMPLES, "batch": batch, "confidence_level": COVERAGE, "method": "percentile", "rng": rng}
    low, high = stats.bootstrap((values,), np.mean, **options).confidence_interval
    return float(low), float(high)


def percent_number(key: str, title: str, of_images: np.ndarray, protocol: str, seed: int) -> Number:
    """The mean of a number of every test image, in percent, with its bootstrap interval.

    Args:
        key: of the number.
        title: of the number.
        of_images: [Q] in 0..1 (bool, or an average precision).
        protocol: of the number.
        seed: of the bootstrap.
    """
    low, high = interval(of_images, seed)
    return Number(key, title, 100 * float(np.mean(of_images)), protocol, low=100 * low, high=100 * high)


def forward_flops(config: ConfigDict, teacher: Params, images: int, px: int) -> float:
    """A teacher's operations for some images, roughly: every parameter meets every patch once."""
    numbers = sum(leaf.size for leaf in jax.tree.leaves(teacher["backbone"]))
    return 2.0 * images * numbers * (-(-px // token_px(config))) ** 2


@contextlib.contextmanager
def announced(name: str, cost: Cost, poll: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Prints the cost of a part that takes more than some seconds, its progress, and in the end how long it took.

    Args:
        name: of the part.
        cost: of the part; below ANNOUNCED_FLOPS nothing is printed, as in all processes but the first.
        poll: called before each unit of work.

    Yields:
        `poll` for the part, which counts.
    """
    if cost.flops < ANNOUNCED_FLOPS or not processes.is_first():
        yield poll
        return
    print(f"{name}: {cost.work}", flush=True)
    progress, started = Progress(name, cost.calls, cost.unit), False

    def counting() -> None:
        nonlocal started
        if started:
            progress.advance()
        started = True
        poll()

    yield counting
    progress.advance()
    progress.close()
