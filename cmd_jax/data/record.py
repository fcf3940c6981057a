"""What every source of images gives: `Record`, one encoded image, and `Source`, a split of them."""

from typing import NamedTuple, Protocol

import numpy as np

SPLITS = ("train", "test")
UNLABELLED = -1
NO_BOXES = np.zeros((0, 4), np.float32)


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
    note: str  # how a folder was read and what was left out, for people; "" where there is nothing to say

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...
