"""How many labels an expert must give: accuracy over all training images when some are labelled and the others filled in."""

from collections.abc import Iterator

import numpy as np

from cmd_jax.evaluation.protocol import Cost, EvalInputs, percent_number
from cmd_jax.labelling.fill import FOLDS, STEPS, classes_of, fill_in
from cmd_jax.labelling.select import choose_images, worth
from cmd_jax.metrics import Number

A_CLASS = (1, 2, 5, 10)  # labelled images, on average
DRAWS = 5  # of images at random


def chosen_images(features: np.ndarray, labels: np.ndarray, counts: list[int]) -> Iterator[np.ndarray]:
    """Asks for images round by round, and is told their labels.

    Args:
        features: [N, F].
        labels: [N] int, of which those are read that were asked for.
        counts: how many images have a label after each round, ascending.

    Yields:
        [count] int64 rows; each round keeps those of the last.
    """
    labelled = np.zeros(0, np.int64)
    for count in counts:
        weights = worth(fill_in(features, labelled, labels[labelled]).probability) if len(labelled) else None
        asked = choose_images(features, count - len(labelled), labelled, weights)
        labelled = np.concatenate([labelled, asked])
        yield labelled


def _counts(inputs: EvalInputs) -> dict[int, int]:
    """Labelled images a class -> in all; those that would leave none to fill in are left out."""
    return {n: n * inputs.classes() for n in A_CLASS if n * inputs.classes() < len(inputs.gallery.labels)}


def cost(inputs: EvalInputs) -> Cost:
    """Of `measure`."""
    (images, width), counts = inputs.gallery.features.shape, _counts(inputs)
    of_rounds = ", ".join(f"{count:,}" for count in counts.values())
    work = f"{of_rounds} of {images:,} images labelled, chosen and {DRAWS} times at random"
    fits = len(counts) * (FOLDS + 2 + DRAWS)
    flops = 2.0 * images * width * (len(counts) * images + fits * (2 * STEPS * inputs.classes() + 2 * width))
    return Cost(work, len(counts), "rounds", flops)


def measure(inputs: EvalInputs) -> list[Number]:
    """For each number of labels, images chosen by `labelling.select` beside images drawn at random."""
    features, labels, seed = inputs.gallery.features, inputs.gallery.labels, inputs.config.seed
    counts, numbers = _counts(inputs), []
    right = lambda labelled: classes_of(features, labelled, labels[labelled]) == labels
    for (n, count), chosen in zip(counts.items(), chosen_images(features, labels, list(counts.values())), strict=True):
        inputs.poll()
        draws = [np.random.default_rng((seed, draw)).permutation(len(labels))[:count] for draw in range(DRAWS)]
        at_random = [100 * float(right(drawn).mean()) for drawn in draws]
        title = f"{n} label{'s' * (n > 1)}/class"
        protocol = (
            f"of all {len(labels):,} train images, {count:,} labelled, the others by soft k-means from these, "
            f"{inputs.features()}"
        )
        by = f"the same, mean of {DRAWS} draws (deviation {np.std(at_random, ddof=1):.1f})"
        numbers += [
            percent_number(f"labels{n}_chosen", f"{title}, chosen", right(chosen), protocol, seed),
            Number(f"labels{n}_random", f"{title}, random", float(np.mean(at_random)), f"{protocol}, {by}"),
        ]
    return numbers
