"""What the builders over genuine archives share: features, checks of counts, and examples with boxes and parts."""

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from cmd_jax.data.decode import FORMATS, orientation
from cmd_jax.errors import BadImage, DatasetError

# Parts are points; for pointing a part is a square around its point with this share of the object's longer side.
PART_SIDE = 0.15


def features(classes: int, parts: int = 0) -> tfds.features.FeaturesDict:
    """Features of an image with its class, the box of its object and, where given, its parts."""
    described: dict[str, Any] = {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=classes),
        "id": tfds.features.Text(),
        # (ymin, xmin, ymax, xmax), fractions of the image.
        "box": tfds.features.Tensor(shape=(4,), dtype=np.float32),
    }
    if parts:
        # (y, x, visible) of each part; fractions of the image.
        described["part_locations"] = tfds.features.Tensor(shape=(parts, 3), dtype=np.float32)
        # Squares around the visible parts, zero area for the others.
        described["part_boxes"] = tfds.features.Tensor(shape=(parts, 4), dtype=np.float32)
    return tfds.features.FeaturesDict(described)


def example(
    encoded: bytes, label: int, name: str, box: np.ndarray, parts: np.ndarray | None = None, banner_px: int = 0
) -> tuple[str, dict[str, Any]]:
    """Key and example of an image.

    Args:
        encoded: the file's bytes; they are stored as they are.
        label: 0-based.
        name: unique; the key.
        box: [4] (ymin, xmin, ymax, xmax) in pixels of the stored picture, as annotators saw it: not turned by EXIF.
        parts: [P, 3] (y, x, visible) in the same.
        banner_px: rows at the bottom that are no part of the picture; fractions are of what is above.

    Raises:
        BadImage: the bytes are no picture, or one without rows above the banner.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as opened:
            width, height = opened.size
            turned = orientation(opened)
    # Pillow's plugins raise many types on damaged files; all of them mean the same here.
    except Exception as error:
        raise BadImage(f"{name}: not a readable picture ({error}); download the archive again") from error
    if height <= banner_px:
        raise BadImage(f"{name}: {height} rows are all of the banner of {banner_px}; download the archive again")
    scale = np.array([height - banner_px, width], np.float64)
    content = {"image": io.BytesIO(encoded), "label": label, "id": name}
    content["box"] = _turn_boxes(np.clip(box / np.tile(scale, 2), 0, 1).reshape(1, 4), turned)[0].astype(np.float32)
    if parts is not None:
        points = _turn(parts[:, :2] / scale, turned)
        content["part_locations"] = np.concatenate([points, parts[:, 2:]], axis=1).astype(np.float32)
        content["part_boxes"] = (_turn_boxes(part_boxes(parts, box, scale), turned) * parts[:, 2:]).astype(np.float32)
    return name, content


def _turn(points: np.ndarray, orientation: int) -> np.ndarray:
    """[N, 2] (y, x) fractions of the stored picture -> of the one that decoding turns by its EXIF orientation (1..8)."""
    y, x = points.T
    turned = {2: (y, 1 - x), 3: (1 - y, 1 - x), 4: (1 - y, x), 5: (x, y), 6: (x, 1 - y), 7: (1 - x, 1 - y), 8: (1 - x, y)}
    return np.stack(turned.get(orientation, (y, x)), axis=1)


def _turn_boxes(boxes: np.ndarray, orientation: int) -> np.ndarray:
    """The same for [N, 4] (ymin, xmin, ymax, xmax)."""
    one, other = _turn(boxes[:, :2], orientation), _turn(boxes[:, 2:], orientation)
    return np.concatenate([np.minimum(one, other), np.maximum(one, other)], axis=1)


def part_boxes(parts: np.ndarray, box: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Squares around the visible parts.

    Args:
        parts: [P, 3] (y, x, visible) in pixels.
        box: [4] the object's box in pixels.
        scale: [2] height and width of the image.

    Returns:
        [P, 4] float32 (ymin, xmin, ymax, xmax), fractions of the image; zeros for parts that are not visible.
    """
    half = PART_SIDE / 2 * max(box[2] - box[0], box[3] - box[1])
    low, high = (parts[:, :2] - half) / scale, (parts[:, :2] + half) / scale
    return (np.clip(np.concatenate([low, high], axis=1), 0, 1) * parts[:, 2:]).astype(np.float32)


def check_counts(path: str, dataset: str, splits: Iterable[str], counts: dict[str, int], classes: int, wanted: int) -> None:
    """Compares what an archive lists with the official counts.

    Args:
        path: of the archive.
        dataset: its name for the message.
        splits: of every image.
        counts: official images of each split.
        classes: how many the archive lists.
        wanted: official classes.

    Raises:
        DatasetError: a count differs.
    """
    listed = list(splits)
    for split, count in counts.items():
        found = listed.count(split)
        if found != count:
            raise DatasetError(f"{path} lists {found:,} {split} images, {dataset} has {count:,}; download the archive again")
    if classes != wanted:
        raise DatasetError(f"{path} lists {classes} classes, {dataset} has {wanted}; download the archive again")
