"""Random access to encoded images: index -> `Record`, the same for an embedded, a prepared and a folder dataset."""

import os
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from cmd_jax.config import ConfigDict, ConfigError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
SPLITS = ("train", "test")
UNLABELLED = -1


class Record(NamedTuple):
    """One image as it is stored.

    Attributes:
        encoded: the file's bytes.
        label: class index, or UNLABELLED.
        name: path or id, for messages and pictures.
        part_boxes: [P, 4] float32 (ymin, xmin, ymax, xmax), fractions of the image; P is 0 where the data has none.
    """

    encoded: bytes
    label: int
    name: str
    part_boxes: np.ndarray


class Source(Protocol):
    """A split of a dataset."""

    class_names: tuple[str, ...]  # empty when unlabelled

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


NO_BOXES = np.zeros((0, 4), np.float32)


class FolderSource:
    """Images of a folder: `train/CLASS/*` and `test/CLASS/*`, or flat and unlabelled.

    Classes are the sorted names of the folders under `train`; files are sorted by path.
    """

    def __init__(self, folder: str, split: str):
        folder = os.path.expanduser(folder)
        if not os.path.isdir(folder):
            raise ConfigError(
                f"data.folder {folder!r} is not a directory; give the folder that holds train/CLASS/* or the images"
            )
        root = os.path.join(folder, split)
        if os.path.isdir(os.path.join(folder, "train")):
            self.class_names = _subfolders(os.path.join(folder, "train"))
            self.paths, self.labels = self._labelled(root) if os.path.isdir(root) else ([], [])
            if not self.class_names and os.path.isdir(root):  # train/* without classes
                self.paths = _images(root)
                self.labels = [UNLABELLED] * len(self.paths)
        else:
            self.class_names = ()
            self.paths = _images(folder) if split == "train" else []
            self.labels = [UNLABELLED] * len(self.paths)
        if split == "train" and not self.paths:
            raise ConfigError(
                f"data.folder {folder!r} holds no images; put files ({', '.join(IMAGE_SUFFIXES)}) into it or into train/CLASS/"
            )

    def _labelled(self, root: str) -> tuple[list[str], list[int]]:
        unknown = sorted(set(_subfolders(root)) - set(self.class_names))
        if unknown:
            raise ConfigError(
                f"{root} has classes that train/ has not: {', '.join(unknown[:5])}; give both splits the same class folders"
            )
        paths, labels = [], []
        for label, name in enumerate(self.class_names):
            directory = os.path.join(root, name)
            found = _images(directory) if os.path.isdir(directory) else []
            if not found:
                raise ConfigError(f"class folder {directory} holds no images; fill it or remove the class from both splits")
            paths += found
            labels += [label] * len(found)
        return paths, labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Record:
        with open(self.paths[index], "rb") as file:
            return Record(file.read(), self.labels[index], self.paths[index], NO_BOXES)


def _subfolders(directory: str) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and not entry.name.startswith(".")))


def _images(directory: str) -> list[str]:
    return sorted(
        os.path.join(parent, name)
        for parent, _, names in os.walk(directory)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
    )


class TFDSSource:
    """A split of one of our TFDS builders, prepared as ArrayRecord on first use; TensorFlow is not needed."""

    def __init__(self, builder_class: Callable, config: ConfigDict, split: str):
        import tensorflow_datasets as tfds  # slow to import, and needed only here

        builder = prepare(builder_class, config.data_dir, config.manual_dir)
        self._rows = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        self.class_names = tuple(builder.info.features["label"].names)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        return Record(row["image"], int(row["label"]), row["id"].decode(), row["part_boxes"])


def prepare(builder_class: Callable, data_dir: str, manual_dir: str | None):
    """Builds a TFDS dataset on disk if it is not there yet, and returns its builder."""
    import tensorflow_datasets as tfds

    builder = builder_class(data_dir=os.path.expanduser(data_dir), file_format="array_record")
    download_config = tfds.download.DownloadConfig(manual_dir=manual_dir and os.path.expanduser(manual_dir))
    builder.download_and_prepare(download_config=download_config)
    return builder


def builder_class(name: str) -> Callable:
    """The TFDS builder of a source's name."""
    if name == "synthetic_birds":
        from cmd_jax.data.builders.synthetic_birds import SyntheticBirds

        return SyntheticBirds
    from cmd_jax.data.builders.cub import Cub

    return Cub


def open_source(config: ConfigDict, split: str) -> Source:
    """Opens a split.

    Args:
        config: the config's section `data`.
        split: "train" or "test". The test split of a folder without one has length 0.

    Raises:
        ConfigError: the folder is missing or holds nothing usable.
    """
    if config.source == "folder":
        return FolderSource(config.folder, split)
    return TFDSSource(builder_class(config.source), config, split)
