"""Published datasets: their description, the annotations in their archives, and their examples for TFDS."""

import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cmd_jax.data.decode import FORMATS, orientation
from cmd_jax.datasets import archives
from cmd_jax.datasets.archives import Archive
from cmd_jax.errors import BadImage, DatasetError
from cmd_jax.progress import track

# Parts are points; for pointing a part is a square around its point with this share of the object's longer side.
PART_SIDE = 0.15


class Annotation(NamedTuple):
    """The annotation of one image; coordinates in pixels of the stored image, before EXIF rotation.

    Attributes:
        label: 0-based.
        split: "train" or "test".
        box: [4] (ymin, xmin, ymax, xmax) of the object.
        parts: [P, 3] (y, x, visible); None where there are none.
    """

    label: int
    split: str
    box: np.ndarray
    parts: np.ndarray | None = None


class Annotations(NamedTuple):
    """All annotations of a dataset.

    Attributes:
        class_names: by label.
        images: by the image's path in its archive.
    """

    class_names: list[str]
    images: dict[str, Annotation]


class Dataset(NamedTuple):
    """A published dataset that is prepared from its genuine archives.

    Attributes:
        name: of the directory that TFDS prepares it in.
        title: for messages.
        description: for people, as is the homepage.
        layouts: sets of files that each hold the whole dataset; a program can fetch the first one if its files have urls.
        counts: official number of images by split.
        classes: official number.
        read: annotations from the paths of a layout's files by name.
        image_archives: path of the archive of each split's images, from the same.
        prefix: what an image's path in its archive begins with and its id does not.
        parts: P.
        banner_px: rows at the bottom that the field cuts off; fractions are of what is above.
        level: which of several sets of labels; each is prepared in a directory of its own.
        version: of the prepared form.
    """

    name: str
    title: str
    description: str
    homepage: str
    layouts: tuple[tuple[Archive, ...], ...]
    counts: dict[str, int]
    classes: int
    read: Callable[[dict[str, str]], Annotations]
    image_archives: Callable[[dict[str, str]], dict[str, str]]
    prefix: str = ""
    parts: int = 0
    banner_px: int = 0
    level: str | None = None
    version: str = "1.0.0"

    def features(self) -> dict[str, Any]:
        """TFDS features by name, beside the label's."""
        import tensorflow_datasets as tfds  # slow to import

        described: dict[str, Any] = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            # (ymin, xmin, ymax, xmax), fractions of the image.
            "box": tfds.features.Tensor(shape=(4,), dtype=np.float32),
        }
        if self.parts:
            # (y, x, visible) of each part; fractions of the image.
            described["part_locations"] = tfds.features.Tensor(shape=(self.parts, 3), dtype=np.float32)
            # Squares around the visible parts, zero area for the others.
            described["part_boxes"] = tfds.features.Tensor(shape=(self.parts, 4), dtype=np.float32)
        return described

    def splits(self, manual_dir: str) -> tuple[list[str], dict[str, Iterator[tuple[str, dict]]]]:
        """Names of the classes, and keys and examples of every split.

        Raises:
            DatasetError: an archive is missing or not the genuine one.
        """
        paths = archives.locate(manual_dir, self.layouts, self.name)
        annotations = self.read(paths)
        self._check_counts(manual_dir, annotations)
        images = self.image_archives(paths)
        return annotations.class_names, {split: self._generate(images[split], annotations, split) for split in self.counts}

    def _check_counts(self, directory: str, annotations: Annotations) -> None:
        title = f"{self.title} ({self.level})" if self.level else self.title
        listed = [image.split for image in annotations.images.values()]
        found = {f"{split} images": (listed.count(split), count) for split, count in self.counts.items()}
        found["classes"] = (len(annotations.class_names), self.classes)
        for what, (count, official) in found.items():
            if count != official:
                raise DatasetError(
                    f"{directory}: the archive lists {count:,} {what}, {title} has {official:,}; download the archive again"
                )

    def _generate(self, archive: str, annotations: Annotations, split: str) -> Iterator[tuple[str, dict]]:
        wanted = {path for path, image in annotations.images.items() if image.split == split}
        what = "/".join(filter(None, (self.name, self.level)))
        for path, encoded in track(archives.images(archive, wanted), f"{what} {split}", len(wanted)):
            image = annotations.images[path]
            yield example(encoded, image, path.removeprefix(self.prefix), self.banner_px)


def example(encoded: bytes, image: Annotation, name: str, banner_px: int = 0) -> tuple[str, dict[str, Any]]:
    """Makes the key and the TFDS example of an image.

    Args:
        encoded: the file's bytes; they are stored as they are.
        image: its annotation.
        name: unique; the key.
        banner_px: rows at the bottom that are cut off; fractions are of what is above.

    Raises:
        BadImage: the bytes are not an image, or it has no rows above the banner.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as opened:
            width, height = opened.size
            turned = orientation(opened)
    # Pillow's plugins raise many types on damaged files; all of them mean the same here.
    except Exception as error:
        raise BadImage(f"{name}: not a readable image ({error}); download the archive again") from error
    if height <= banner_px:
        raise BadImage(f"{name}: {height} rows are all in the banner of {banner_px}; download the archive again")
    scale = np.array([height - banner_px, width], np.float64)
    content = {"image": io.BytesIO(encoded), "label": image.label, "id": name}
    box = np.clip(image.box / np.tile(scale, 2), 0, 1).reshape(1, 4)
    content["box"] = _turn_boxes(box, turned)[0].astype(np.float32)
    if image.parts is not None:
        points, visible = _turn(image.parts[:, :2] / scale, turned), image.parts[:, 2:]
        content["part_locations"] = np.concatenate([points, visible], axis=1).astype(np.float32)
        boxes = _turn_boxes(part_boxes(image.parts, image.box, scale), turned)
        content["part_boxes"] = (boxes * visible).astype(np.float32)
    return name, content


def _turn(points: np.ndarray, orientation: int) -> np.ndarray:
    """Applies an EXIF orientation (1..8) to [N, 2] (y, x) fractions of the stored image."""
    y, x = points.T
    turned = {2: (y, 1 - x), 3: (1 - y, 1 - x), 4: (1 - y, x), 5: (x, y), 6: (x, 1 - y), 7: (1 - x, 1 - y), 8: (1 - x, y)}
    return np.stack(turned.get(orientation, (y, x)), axis=1)


def _turn_boxes(boxes: np.ndarray, orientation: int) -> np.ndarray:
    """The same for [N, 4] (ymin, xmin, ymax, xmax)."""
    one, other = _turn(boxes[:, :2], orientation), _turn(boxes[:, 2:], orientation)
    return np.concatenate([np.minimum(one, other), np.maximum(one, other)], axis=1)


def part_boxes(parts: np.ndarray, box: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Makes squares around the visible parts.

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


def text_rows(lines: Iterable[str], columns: int = -1) -> Iterator[list[str]]:
    """Words of the lines that are not empty; the last of `columns` + 1 words may hold spaces."""
    return (line.strip().split(maxsplit=columns) for line in lines if line.strip())
