"""TFDS builder of CUB-200-2011 over the genuine archive; no TensorFlow.

Wah, Branson, Welinder, Perona, Belongie: The Caltech-UCSD Birds-200-2011 Dataset, CNS-TR-2011-001.
"""

import io
import os
import tarfile
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from cmd_jax.config import ConfigError

ARCHIVE = "CUB_200_2011.tgz"
URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
ROOT = "CUB_200_2011"
CLASSES, PARTS = 200, 15
OFFICIAL_COUNTS = {"train": 5994, "test": 5794}
# Parts are points; for pointing a part is a square around its point with this share of the bird's longer side.
PART_SIDE = 0.15


class Cub(tfds.core.GeneratorBasedBuilder):
    """CUB-200-2011: 200 bird species with boxes and 15 part locations."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Download {ARCHIVE} (1.1 GB) from {URL} and put it, unchanged, into the manual directory."
    CLASSES, COUNTS = CLASSES, OFFICIAL_COUNTS

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Caltech-UCSD Birds-200-2011 with the official split.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(num_classes=self.CLASSES),
                    "id": tfds.features.Text(),
                    # (ymin, xmin, ymax, xmax), fractions of the image.
                    "box": tfds.features.Tensor(shape=(4,), dtype=np.float32),
                    # (y, x, visible) of each part; fractions of the image.
                    "part_locations": tfds.features.Tensor(shape=(PARTS, 3), dtype=np.float32),
                    # Squares around the visible parts, zero area for the others.
                    "part_boxes": tfds.features.Tensor(shape=(PARTS, 4), dtype=np.float32),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://www.vision.caltech.edu/datasets/cub_200_2011/",
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        archive = os.path.join(os.fspath(dl_manager.manual_dir), ARCHIVE)
        if not os.path.exists(archive):
            raise ConfigError(
                f"{archive} is missing. {self.MANUAL_DOWNLOAD_INSTRUCTIONS} Or name its directory: --config.data.manual_dir=DIR"
            )
        tables = read_tables(archive)
        self.info.features["label"].names = tables.class_names
        for split, wanted in self.COUNTS.items():
            found = sum(image.split == split for image in tables.images.values())
            if found != wanted:
                raise ConfigError(
                    f"{archive} lists {found} {split} images, CUB-200-2011 has {wanted}; download the archive again"
                )
        return {split: self._generate_examples(archive, tables, split) for split in self.COUNTS}

    def _generate_examples(self, archive: str, tables: "Tables", split: str) -> Iterator[tuple[str, dict]]:
        wanted = {f"{ROOT}/images/{path}": image for path, image in tables.images.items() if image.split == split}
        with tarfile.open(archive, "r|gz") as tar:  # members are read in place: nothing is extracted to disk
            for member in tar:
                image = wanted.pop(member.name.removeprefix("./"), None)
                if image is None:
                    continue
                encoded = tar.extractfile(member).read()
                with Image.open(io.BytesIO(encoded)) as opened:
                    width, height = opened.size
                scale = np.array([height, width], np.float32)
                yield (
                    image.path,
                    {
                        "image": io.BytesIO(encoded),
                        "label": image.label,
                        "id": image.path,
                        "box": (image.box / np.tile(scale, 2)).astype(np.float32),
                        "part_locations": np.concatenate([image.parts[:, :2] / scale, image.parts[:, 2:]], axis=1).astype(
                            np.float32
                        ),
                        "part_boxes": part_boxes(image.parts, image.box, scale),
                    },
                )
        if wanted:
            raise ConfigError(f"{archive} lacks {len(wanted)} images, first {sorted(wanted)[0]}; download the archive again")


class CubImage:
    """One row of the archive's tables; coordinates in pixels, (y, x) order."""

    def __init__(self, path: str):
        self.path = path
        self.label = -1
        self.split = ""
        self.box = np.zeros(4)  # ymin, xmin, ymax, xmax
        self.parts = np.zeros((PARTS, 3))  # y, x, visible


class Tables:
    """The text files of the archive: images by path and the class names by label."""

    def __init__(self, files: dict[str, str]):
        def rows(name: str) -> Iterator[list[str]]:
            return (line.split() for line in files[name].splitlines() if line.strip())

        # "001.Black_footed_Albatross", ids are 1-based
        self.class_names = [name for _, name in sorted((int(number), name) for number, name in rows("classes.txt"))]
        by_id = {number: CubImage(path) for number, path in rows("images.txt")}
        for number, label in rows("image_class_labels.txt"):
            by_id[number].label = int(label) - 1
        for number, is_train in rows("train_test_split.txt"):
            by_id[number].split = "train" if is_train == "1" else "test"
        for number, *box in rows("bounding_boxes.txt"):
            x, y, width, height = map(float, box)
            by_id[number].box = np.array([y, x, y + height, x + width])
        for number, part, x, y, visible in rows("parts/part_locs.txt"):
            by_id[number].parts[int(part) - 1] = float(y), float(x), float(visible)
        self.images = {image.path: image for image in by_id.values()}


TABLE_FILES = (
    "classes.txt",
    "images.txt",
    "image_class_labels.txt",
    "train_test_split.txt",
    "bounding_boxes.txt",
    "parts/part_locs.txt",
)


def read_tables(archive: str) -> Tables:
    """Reads the text files of the archive.

    Raises:
        ConfigError: the file is no gzipped tar, or a table is missing.
    """
    files = {}
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                name = member.name.removeprefix("./").removeprefix(f"{ROOT}/")
                if name in TABLE_FILES:
                    files[name] = tar.extractfile(member).read().decode()
                if len(files) == len(TABLE_FILES):
                    break
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ConfigError(f"{archive} cannot be read ({error}); download the archive again") from error
    missing = sorted(set(TABLE_FILES) - set(files))
    if missing:
        raise ConfigError(f"{archive} lacks {', '.join(missing)}; it is not CUB-200-2011, or it is damaged: download it again")
    return Tables(files)


def part_boxes(parts: np.ndarray, box: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Squares around the visible parts.

    Args:
        parts: [P, 3] (y, x, visible) in pixels.
        box: [4] the bird's box in pixels.
        scale: [2] height and width of the image.

    Returns:
        [P, 4] float32 (ymin, xmin, ymax, xmax), fractions of the image; zeros for parts that are not visible.
    """
    half = PART_SIDE / 2 * max(box[2] - box[0], box[3] - box[1])
    low, high = (parts[:, :2] - half) / scale, (parts[:, :2] + half) / scale
    return (np.clip(np.concatenate([low, high], axis=1), 0, 1) * parts[:, 2:]).astype(np.float32)
