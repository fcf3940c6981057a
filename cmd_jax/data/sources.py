"""Random access to encoded images: index -> `Record`, the same for an embedded, a prepared and a folder dataset."""

import hashlib
import os
from collections.abc import Callable

from cmd_jax.config import TFDS_PREFIX, ConfigDict
from cmd_jax.data.folder import FolderSource
from cmd_jax.data.record import NO_BOXES, UNLABELLED, Record, Source
from cmd_jax.datasets import prepared
from cmd_jax.errors import ConfigError
from cmd_jax.text import printable


class TFDSSource:
    """A split of one of our builders, prepared as ArrayRecord on first use."""

    note = ""

    def __init__(self, builder_class: Callable, config: ConfigDict, split: str, name: str | None = None):
        import tensorflow_datasets as tfds  # slow to import, and needed only here

        builder = prepared.prepare(builder_class, config.data_dir, config.manual_dir, name or builder_class.name)
        self._rows = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        self._banner_px = getattr(builder_class, "BANNER_PX", 0)
        self.class_names = tuple(map(printable, builder.info.features["label"].names))
        self.files = prepared.files(builder)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        boxes = row.get("part_boxes", NO_BOXES)
        return Record(row["image"], int(row["label"]), printable(row["id"].decode()), boxes, self._banner_px)


class ForeignSource:
    """A split of any TFDS dataset with images: its first image feature, and its label if it has one.

    "test" is the dataset's test split, or its validation split where there is no other; a dataset with neither has length 0.
    """

    note = ""

    def __init__(self, name: str, config: ConfigDict, split: str):
        import tensorflow_datasets as tfds

        builder = prepared.foreign_builder(name, config.data_dir, config.manual_dir)
        described = builder.info.features
        images = [key for key, feature in described.items() if isinstance(feature, tfds.features.Image)]
        if not images:
            raise ConfigError(
                f"data.source is '{TFDS_PREFIX}{name}', which has no image among {', '.join(described)}; choose another"
            )
        labels = [key for key, feature in described.items() if isinstance(feature, tfds.features.ClassLabel)]
        named = (builder.info.supervised_keys or (None, None))[1]
        self._image, self._label = images[0], named if named in labels else (labels or [None])[0]
        self.class_names = tuple(map(printable, described[self._label].names)) if self._label else ()
        self.files = prepared.files(builder)
        self._name = f"{name}/{split}"
        choices = ("train",) if split == "train" else ("test", "validation")
        chosen = next((choice for choice in choices if choice in builder.info.splits), None)
        if chosen is None and split == "train":
            raise ConfigError(f"data.source is '{TFDS_PREFIX}{name}', which has no train split but {list(builder.info.splits)}")
        self._rows = ()
        if chosen:
            self._rows = builder.as_data_source(split=chosen, decoders={self._image: tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        label = int(row[self._label]) if self._label else UNLABELLED
        return Record(row[self._image], label, f"{self._name}/{index}", NO_BOXES)


def eval_section(config: ConfigDict) -> ConfigDict:
    """The section `data` as evaluation reads it: `eval_source` and `eval_folder` in the place of the training data.

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
    """Changes when a file that the source reads is added, removed, renamed or written: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in source.files:
        stat = os.stat(path)
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def open_source(config: ConfigDict, split: str) -> Source:
    """Opens a split.

    Args:
        config: the config's section `data`, or `eval_section` of it.
        split: "train" or "test". The test split of data without one has length 0.

    Raises:
        ConfigError: the folder is missing or holds nothing usable, or TFDS does not know the name.
        DatasetError: an archive is missing or damaged.
    """
    if config.source == "folder":
        return FolderSource(config.folder, split)
    if config.source.startswith(TFDS_PREFIX):
        return ForeignSource(config.source.removeprefix(TFDS_PREFIX), config, split)
    return TFDSSource(prepared.builder_class(config.source), config, split, config.source)
