"""The images that an evaluation reads: training and test images with labels, or training images alone without them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cmd_jax.config import ConfigDict
from cmd_jax.data.identity import Split, identify
from cmd_jax.data.sources import Record, Source, eval_section, where
from cmd_jax.datasets.prepared import open_source
from cmd_jax.errors import ConfigError, NoLabels


class Splits(NamedTuple):
    """The gallery and the queries of an evaluation; without labels `test` has length 0 and there are no class names."""

    train: Source
    test: Source

    def labelled(self) -> bool:
        return len(self.test) > 0

    def select(self, train: np.ndarray, test: np.ndarray | None) -> "Splits":
        """The images with these ascending indices of either split; None is all of them."""
        return Splits(_select(self.train, train), self.test if test is None else _select(self.test, test))


class Part:
    """Some images of a source, in the given order."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self._source, self._indices = source, indices
        self.class_names, self.files, self.note = source.class_names, source.files, source.note

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._indices[index])]


def _select(source: Source, indices: np.ndarray) -> Source:
    return source if len(indices) == len(source) else Part(source, indices)


def open_splits(config: ConfigDict) -> tuple[Splits, NoLabels | None]:
    """Opens the images to evaluate on.

    Returns:
        The labelled splits of `open_labelled_splits` and None; or, where there are none, `eval.label_free_images` of the
        training images, spread evenly over them, and the reason.

    Raises:
        ConfigError, DatasetError: the data that `data.eval_source` or `data.eval_folder` names cannot be used.
    """
    try:
        return open_labelled_splits(config), None
    except NoLabels as reason:
        train = open_source(config.data, "train")
        return Splits(Part(train, spread(len(train), config.eval.label_free_images)), Part(train, ())), reason


def open_labelled_splits(config: ConfigDict) -> Splits:
    """Opens both splits of the data to evaluate on: `data.eval_source` and `data.eval_folder`, or the training data.

    Raises:
        NoLabels: the training data has no labels or no test images, and no other data is named.
        ConfigError, DatasetError: the other data cannot be used.
    """
    data = eval_section(config.data)
    train, test = (open_source(data, split) for split in ("train", "test"))
    named = config.data.eval_source or config.data.eval_folder
    refuse = ConfigError if named else NoLabels
    other = "" if named else ", or name labelled data: --config.data.eval_source=NAME or --config.data.eval_folder=DIR"
    if not train.class_names:
        raise refuse(f"{where(data)} has no labels; k-NN and retrieval need train/CLASS/* and test/CLASS/*{other}")
    if not len(test):
        raise refuse(f"{where(data)} has no test images; k-NN and retrieval need test/CLASS/* beside train/CLASS/*{other}")
    return Splits(train, test)


def identify_splits(config: ConfigDict, splits: Splits, train: Source | None = None) -> dict[str, Split]:
    """Identifies the images of a run.

    Args:
        config: of the run.
        splits: of `open_splits`.
        train: the training images; None where only those count that an evaluation reads.

    Returns:
        The splits by their keys in `identity.SPLITS`: "eval_train" only if `data.eval_source` or `data.eval_folder` names other
        data than that of the training, "eval_test" only if there are labels.
    """
    named = bool(config.data.eval_source or config.data.eval_folder)
    if train is None and not named:
        train = splits.train if splits.labelled() else open_source(config.data, "train")
    found = {"train": identify(train, config.data)} if train is not None else {}
    if splits.labelled():
        evaluated = eval_section(config.data)
        if named:
            found["eval_train"] = identify(splits.train, evaluated)
        found["eval_test"] = identify(splits.test, evaluated)
    return found


def spread(count: int, wanted: int) -> np.ndarray:
    """Up to `wanted` of the indices 0..count - 1, evenly spread, so over the classes of a sorted split: [min] int64."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(np.int64))


def order_within_class(labels: np.ndarray, seed: int) -> np.ndarray:
    """The place of every item in a random order of its class, from which parts with an equal share of all classes are drawn.

    Args:
        labels: [N] int.
        seed: of the order.

    Returns:
        [N] int64, 0 to the class's size - 1.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]  # by class, in random order within
    _, first, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    places = np.empty(len(labels), np.int64)
    places[order] = np.arange(len(labels)) - np.repeat(first, sizes)
    return places
