"""Random access to encoded images: `Source[index]` is a `Record`, the same for a prepared dataset and a folder."""

import glob
import hashlib
import os
from typing import Any, NamedTuple, Protocol

import numpy as np

from cmd_jax.config import TFDS_PREFIX, ConfigDict
from cmd_jax.errors import ConfigError
from cmd_jax.text import printable

SPLITS = ("train", "test")
UNLABELLED = -1
NO_BOXES = np.zeros((0, 4), np.float32)


class Record(NamedTuple):
    """One encoded image.

    Attributes:
        encoded: the file's bytes.
        label: class index, or UNLABELLED.
        name: path or id, for messages and figures; printable.
        part_boxes: [P, 4] float32 (ymin, xmin, ymax, xmax), fractions of the image; P is 0 where the data has none.
        banner_px: rows at the bottom that decoding cuts off.
    """

    encoded: bytes
    label: int
    name: str
    part_boxes: np.ndarray
    banner_px: int = 0


class Source(Protocol):
    """A split of a dataset."""

    class_names: tuple[str, ...]  # printable; empty when unlabelled
    files: list[str]  # what it reads
    note: str  # how a folder was read and what was left out, for people; "" where there is nothing to say

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class PreparedSource:
    """A split of a prepared TFDS dataset: its first image feature, and its label if it has one.

    "test" is the dataset's test split, or its validation split where there is no other; a dataset with neither has length 0.
    """

    note = ""

    def __init__(self, builder: Any, split: str, name: str, banner_px: int = 0):
        """
        Args:
            builder: of TFDS, prepared.
            split: "train" or "test".
            name: of the source, as `data.source`.
            banner_px: rows at the bottom of every image that decoding cuts off.

        Raises:
            ConfigError: the dataset has no images or no training split.
        """
        import tensorflow_datasets as tfds  # slow to import, and needed only here

        described, splits = builder.info.features, builder.info.splits
        images = [key for key, feature in described.items() if isinstance(feature, tfds.features.Image)]
        if not images:
            raise ConfigError(f"data.source is {name!r}, which has no image among {', '.join(described)}; choose another")
        labels = [key for key, feature in described.items() if isinstance(feature, tfds.features.ClassLabel)]
        named = (builder.info.supervised_keys or (None, None))[1]
        self._image, self._label = images[0], named if named in labels else (labels or [None])[0]
        self.class_names = tuple(map(printable, described[self._label].names)) if self._label else ()
        self.files = prepared_files(os.fspath(builder.data_path))
        # What an "id" and "part_boxes" mean in datasets of others is not known.
        self._ours = not name.startswith(TFDS_PREFIX)
        self._prefix, self._banner_px = f"{name.removeprefix(TFDS_PREFIX)}/{split}", banner_px
        choices = ("train",) if split == "train" else ("test", "validation")
        chosen = next((choice for choice in choices if choice in splits), None)
        if chosen is None and split == "train":
            raise ConfigError(f"data.source is {name!r}, which has no train split but {list(splits)}; choose another")
        self._rows = ()
        if chosen:
            self._rows = builder.as_data_source(split=chosen, decoders={self._image: tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        label = int(row[self._label]) if self._label else UNLABELLED
        if not self._ours:
            return Record(row[self._image], label, f"{self._prefix}/{index}", NO_BOXES)
        boxes = row.get("part_boxes", NO_BOXES)
        return Record(row[self._image], label, printable(row["id"].decode()), boxes, self._banner_px)


def prepared_files(directory: str) -> list[str]:
    """The files of a prepared TFDS dataset, sorted."""
    patterns = ("*.array_record*", "dataset_info.json", "features.json", "*.labels.txt")
    return sorted(path for pattern in patterns for path in glob.glob(os.path.join(glob.escape(directory), pattern)))


def eval_section(config: ConfigDict) -> ConfigDict:
    """The section `data` for evaluation: `eval_source` and `eval_folder` replace the training data.

    Args:
        config: the config's section `data`.
    """
    section = config.copy_and_resolve_references()
    if config.eval_source or config.eval_folder:
        section.source, section.folder = config.eval_source or "folder", config.eval_folder
    return section


def where(config: ConfigDict) -> str:
    """What a section `data` reads, for messages."""
    return config.folder if config.source == "folder" else config.source


def fingerprint(source: Source) -> str:
    """16 hexadecimal digits that change when a file of the source is added, removed, renamed or written."""
    digest = hashlib.sha256()
    for path in source.files:
        stat = os.stat(path)
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
