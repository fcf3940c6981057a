"""Text tables that CUB-200-2011 and NABirds share: ids, classes, split, boxes and parts of photos of birds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from cmd_jax.datasets import archives
from cmd_jax.datasets.builders.examples import example
from cmd_jax.errors import DatasetError
from cmd_jax.progress import track

FILES = (
    "classes.txt",
    "images.txt",
    "image_class_labels.txt",
    "train_test_split.txt",
    "bounding_boxes.txt",
    "parts/part_locs.txt",
)


@dataclass
class Photo:
    """One row of the tables; coordinates in pixels, (y, x) order."""

    path: str
    parts: np.ndarray  # [P, 3] y, x, visible
    label: int = -1
    split: str = ""
    box: np.ndarray = field(default_factory=lambda: np.zeros(4))  # ymin, xmin, ymax, xmax


@dataclass
class Tables:
    """Photos by their path in the archive, and names of the classes by label."""

    photos: dict[str, Photo]
    class_names: list[str]


def read_tables(archive: str, root: str, parts: int) -> Tables:
    """Reads the tables of an archive.

    Args:
        archive: path of the gzipped tar.
        root: its top folder.
        parts: P.

    Raises:
        DatasetError: the file is no gzipped tar, a table is missing or not of this format.
    """
    files = archives.read_all(archive, {f"{root}/{name}" for name in FILES})
    try:
        return _parse({name: files[f"{root}/{name}"].decode() for name in FILES}, root, parts)
    except (ValueError, KeyError, IndexError) as error:
        raise DatasetError(f"{archive}: its tables do not fit together ({error!r}); download the archive again") from error


def _parse(text: dict[str, str], root: str, parts: int) -> Tables:
    def rows(name: str, columns: int = -1) -> Iterator[list[str]]:
        return (line.strip().split(maxsplit=columns) for line in text[name].splitlines() if line.strip())

    labels = {number: int(label) for number, label in rows("image_class_labels.txt")}
    # Ids of classes are 1-based in CUB; in NABirds they are leaves of a tree, with gaps. Names may hold spaces.
    names = {int(number): name for number, name in rows("classes.txt", 1)}
    used = sorted(set(labels.values()))
    position = {number: label for label, number in enumerate(used)}
    photos = {number: Photo(f"{root}/images/{path}", np.zeros((parts, 3))) for number, path in rows("images.txt", 1)}
    for number, label in labels.items():
        photos[number].label = position[label]
    for number, is_train in rows("train_test_split.txt"):
        photos[number].split = "train" if is_train == "1" else "test"
    for number, *box in rows("bounding_boxes.txt"):
        x, y, width, height = map(float, box)
        photos[number].box = np.array([y, x, y + height, x + width])
    for number, part, x, y, visible in rows("parts/part_locs.txt"):
        photos[number].parts[int(part) - 1] = float(y), float(x), float(visible)
    if any(photo.label < 0 for photo in photos.values()):
        raise ValueError("an image has no class")
    return Tables({photo.path: photo for photo in photos.values()}, [names[number] for number in used])


def generate(archive: str, tables: Tables, split: str, root: str, what: str) -> Iterator[tuple[str, dict]]:
    """Keys and examples of a split, with progress."""
    photos = {path: photo for path, photo in tables.photos.items() if photo.split == split}
    strip: Callable[[str], str] = lambda path: path.removeprefix(f"{root}/images/")
    for path, encoded in track(archives.pictures(archive, set(photos)), f"{what} {split}", len(photos)):
        photo = photos[path]
        yield example(encoded, photo.label, strip(path), photo.box, photo.parts)
