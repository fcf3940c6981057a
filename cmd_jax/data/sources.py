"""Random access to encoded images: index -> `Record`, the same for an embedded, a prepared and a folder dataset."""

import hashlib
import os
import stat
from collections.abc import Callable
from typing import NamedTuple, NoReturn, Protocol

import numpy as np

from cmd_jax.config import TFDS_PREFIX, ConfigDict, ConfigError
from cmd_jax.data import prepared
from cmd_jax.data.errors import BadImage, DatasetError
from cmd_jax.data.text import printable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
SPLITS = ("train", "test")
UNLABELLED = -1
MAX_FILE_BYTES = 256 * 2**20  # no picture of MAX_PIXELS comes near


class Record(NamedTuple):
    """One image as it is stored.

    Attributes:
        encoded: the file's bytes.
        label: class index, or UNLABELLED.
        name: path or id, for messages and pictures; printable.
        part_boxes: [P, 4] float32 (ymin, xmin, ymax, xmax), fractions of the picture; P is 0 where the data has none.
        banner_px: rows at the bottom that are no part of the picture.
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

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


NO_BOXES = np.zeros((0, 4), np.float32)


class FolderSource:
    """Images of a folder: `train/CLASS/*` and `test/CLASS/*`, or flat and unlabelled.

    Classes are the sorted names of the folders under `train`; files are sorted by path. Links are followed where they are
    classes or images, so that a folder may be put together from others; links to folders below a class are not.
    """

    def __init__(self, folder: str, split: str):
        folder = os.path.expanduser(folder)
        if not os.path.isdir(folder):
            raise ConfigError(
                f"data.folder {folder!r} is not a directory; give the folder that holds train/CLASS/* or the images"
            )
        root, train = os.path.join(folder, split), os.path.join(folder, "train")
        self.paths, self.labels, classes = [], [], ()
        if os.path.isdir(train):
            classes = _subfolders(train)
            if classes and os.path.isdir(root):
                self.paths, self.labels = _labelled(root, classes)
            elif os.path.isdir(root):  # train/* without classes
                self.paths = image_files(root)
        elif os.path.isdir(os.path.join(folder, "test")):
            raise ConfigError(f"data.folder {folder!r} has test/ but no train/; put the training images into {train}")
        elif split == "train":
            self.paths = image_files(folder)
        self.labels = self.labels or [UNLABELLED] * len(self.paths)
        self.class_names = tuple(map(printable, classes))
        if split == "train" and not self.paths:
            raise ConfigError(
                f"data.folder {folder!r} holds no images; put files ({', '.join(IMAGE_SUFFIXES)}) into it or into train/CLASS/"
            )
        _check_readable(self.paths, root if os.path.isdir(root) else folder)

    @property
    def files(self) -> list[str]:
        return self.paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Record:
        name = printable(self.paths[index])
        return Record(read_image_file(self.paths[index], name), self.labels[index], name, NO_BOXES)


def read_image_file(path: str, name: str) -> bytes:
    """The bytes of an image file.

    Args:
        path: of the file.
        name: for the error message.

    Raises:
        BadImage: it is no file, too large, or cannot be read.
    """
    try:
        # A named pipe would keep a plain open() waiting for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadImage(f"{name}: is no file but a pipe, device or directory; remove it")
            if status.st_size > MAX_FILE_BYTES:
                raise BadImage(f"{name}: {status.st_size:,} bytes are over the limit of {MAX_FILE_BYTES:,}; remove it")
            return file.read()
    except OSError as error:
        raise BadImage(f"{name}: cannot be read ({error.strerror}); make it readable or remove it") from error


def _labelled(root: str, classes: tuple[str, ...]) -> tuple[list[str], list[int]]:
    """Paths and labels of a split in class folders."""
    unknown = sorted(set(_subfolders(root)) - set(classes))
    if unknown:
        raise ConfigError(
            f"{root} has classes that train/ has not: {', '.join(unknown[:5])}; give both splits the same class folders"
        )
    loose = sorted(entry.name for entry in os.scandir(root) if _is_image(entry.name) and not entry.is_dir())
    if loose:
        raise ConfigError(f"{root} has {len(loose)} images beside its class folders, first {loose[0]}; move them into a class")
    paths, labels = [], []
    for label, name in enumerate(classes):
        directory = os.path.join(root, name)
        found = image_files(directory) if os.path.isdir(directory) else []
        if not found:
            raise ConfigError(f"class folder {directory} holds no images; fill it or remove the class from both splits")
        paths += found
        labels += [label] * len(found)
    return paths, labels


def _subfolders(directory: str) -> tuple[str, ...]:
    try:
        entries = list(os.scandir(directory))
    except OSError as error:
        _refuse_directory(error)
    return tuple(sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")))


def image_files(directory: str) -> list[str]:
    """Paths of the image files below a directory at any depth, sorted.

    Raises:
        DatasetError: a directory cannot be read.
    """
    return sorted(
        os.path.join(parent, name)
        for parent, _, names in os.walk(directory, onerror=_refuse_directory)
        for name in names
        if _is_image(name)
    )


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _refuse_directory(error: OSError) -> NoReturn:
    raise DatasetError(f"directory {error.filename} cannot be read ({error.strerror}); make it readable") from error


def _check_readable(paths: list[str], directory: str) -> None:
    closed = [path for path in paths if not os.access(path, os.R_OK)]
    if closed:
        raise DatasetError(
            f"{directory}: {len(closed):,} of {len(paths):,} images cannot be read, first {closed[0]}; make them readable "
            "(chmod a+r), or remove them and dangling links"
        )


class TFDSSource:
    """A split of one of our builders, prepared as ArrayRecord on first use."""

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
