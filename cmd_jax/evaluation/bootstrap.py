"""How far a mean over test images would move with other test images: percentile bootstrap (Efron, 1979)."""

import numpy as np

RESAMPLES = 1000
COVERAGE = 0.95
AT_ONCE = 2**22  # numbers that are drawn at a time


def interval(of_images: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % interval of a mean: its percentiles over 1,000 samples of the images, drawn with replacement.

    The training images stay as they are: the interval says what other test images would change, not another run.

    Args:
        of_images: [Q] numbers, one of each test image; Q is at least 1.
        seed: of the samples; the same for numbers that are compared with one another.

    Returns:
        (low, high), in the unit of the numbers.
    """
    values, rng = np.asarray(of_images, np.float64), np.random.default_rng(seed)
    means: list[np.ndarray] = []
    rows = max(1, min(RESAMPLES, AT_ONCE // len(values)))
    for start in range(0, RESAMPLES, rows):
        drawn = rng.integers(len(values), size=(min(rows, RESAMPLES - start), len(values)))
        means.append(values[drawn].mean(axis=1))
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(np.concatenate(means), (tail, 1 - tail))
    return float(low), float(high)
