"""TFDS builder of FGVC-Aircraft over the genuine archive; no TensorFlow.

Maji, Kannala, Rahtu, Blaschko, Vedaldi: Fine-Grained Visual Classification of Aircraft, arXiv 1306.5151.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from cmd_jax.datasets import archives
from cmd_jax.datasets.archives import Archive
from cmd_jax.datasets.builders.examples import check_counts, example, features
from cmd_jax.errors import DatasetError
from cmd_jax.progress import track

ROOT = "fgvc-aircraft-2013b/data"
ARCHIVE = Archive(
    "fgvc-aircraft-2013b.tar.gz",
    "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft (2.75 GB)",
    url="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
    size=2_753_340_328,
    sha256="e4e323d410e29f0370c81eabdcbb0e2b813acea1de22891b70b58ff41bfc9834",
)
# Level of the labels -> file of its names.
LEVELS = {"variant": "variants.txt", "family": "families.txt", "manufacturer": "manufacturers.txt"}


class Tables(NamedTuple):
    """One level of labels.

    Attributes:
        class_names: in the archive's order.
        labels: path of an image in the archive -> label.
        splits: path -> "train" (the official trainval) or "test".
        boxes: path -> [4] (ymin, xmin, ymax, xmax) in pixels.
    """

    class_names: list[str]
    labels: dict[str, int]
    splits: dict[str, str]
    boxes: dict[str, np.ndarray]


class Aircraft(tfds.core.GeneratorBasedBuilder):
    """FGVC-Aircraft: 10,000 photos labelled by variant, family and manufacturer; trainval is the training split."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=level, description=f"Labels are the {level}.") for level in LEVELS]
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Put {ARCHIVE.name} from {ARCHIVE.source}, unchanged, into the manual directory."
    LAYOUTS = ((ARCHIVE,),)
    CLASSES = {"variant": 100, "family": 70, "manufacturer": 30}
    COUNTS = {"train": 6667, "test": 3333}
    # The lowest rows are a copyright banner; the field cuts them off, and so does whoever decodes (`Record.banner_px`).
    BANNER_PX = 20

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="FGVC-Aircraft 2013b with the official split; images keep the banner, boxes are of the rest.",
            features=features(self.CLASSES[self.builder_config.name]),
            supervised_keys=("image", "label"),
            homepage="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        archive, level = os.path.join(os.fspath(dl_manager.manual_dir), ARCHIVE.name), self.builder_config.name
        tables = read_tables(archive, level)
        check_counts(
            archive,
            f"FGVC-Aircraft ({level})",
            tables.splits.values(),
            self.COUNTS,
            len(tables.class_names),
            self.CLASSES[level],
        )
        self.info.features["label"].names = tables.class_names
        return {split: self._generate_examples(archive, tables, split) for split in self.COUNTS}

    def _generate_examples(self, archive: str, tables: Tables, split: str) -> Iterator[tuple[str, dict]]:
        wanted = {path for path, of in tables.splits.items() if of == split}
        what = f"aircraft/{self.builder_config.name} {split}"
        for path, encoded in track(archives.pictures(archive, wanted), what, len(wanted)):
            yield example(encoded, tables.labels[path], os.path.basename(path), tables.boxes[path], banner_px=self.BANNER_PX)


def read_tables(archive: str, level: str) -> Tables:
    """Reads the text files of the archive.

    Raises:
        DatasetError: one is missing, or they do not fit together.
    """
    splits = {"train": f"images_{level}_trainval.txt", "test": f"images_{level}_test.txt"}
    names = (LEVELS[level], *splits.values(), "images_box.txt")
    files = archives.read_all(archive, {f"{ROOT}/{name}" for name in names})
    lines = lambda name: [line.strip() for line in files[f"{ROOT}/{name}"].decode().splitlines() if line.strip()]
    path = lambda number: f"{ROOT}/images/{number}.jpg"
    try:
        tables = Tables(lines(LEVELS[level]), {}, {}, {})
        label = {name: position for position, name in enumerate(tables.class_names)}
        for split, file in splits.items():
            for line in lines(file):
                number, name = line.split(maxsplit=1)  # "0034309 Boeing 707": names hold spaces, dots and slashes
                tables.labels[path(number)], tables.splits[path(number)] = label[name], split
        for line in lines("images_box.txt"):
            number, xmin, ymin, xmax, ymax = line.split()
            # 1-based, the last pixel included
            tables.boxes[path(number)] = np.array([float(ymin) - 1, float(xmin) - 1, float(ymax), float(xmax)])
    except (ValueError, KeyError) as error:
        raise DatasetError(f"{archive}: its tables do not fit together ({error!r}); download the archive again") from error
    without = sorted(set(tables.labels) - set(tables.boxes))
    if without:
        raise DatasetError(f"{archive}: images_box.txt lacks {len(without)} images, first {without[0]}; download it again")
    return tables
