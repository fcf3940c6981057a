"""TFDS builder of CUB-200-2011 over the genuine archive; no TensorFlow.

Wah, Branson, Welinder, Perona, Belongie: The Caltech-UCSD Birds-200-2011 Dataset, CNS-TR-2011-001.
"""

import os
from collections.abc import Iterator

import tensorflow_datasets as tfds

from cmd_jax.datasets.archives import Archive
from cmd_jax.datasets.builders import bird_tables
from cmd_jax.datasets.builders.examples import check_counts, features

ROOT, PARTS = "CUB_200_2011", 15
ARCHIVE = Archive(
    "CUB_200_2011.tgz",
    "https://data.caltech.edu/records/65de6-vp158 (1.1 GB)",
    url="https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
    size=1_150_585_339,
    sha256="0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
)


class Cub(tfds.core.GeneratorBasedBuilder):
    """CUB-200-2011: 200 bird species with boxes and 15 part locations."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Put {ARCHIVE.name} from {ARCHIVE.source}, unchanged, into the manual directory."
    LAYOUTS = ((ARCHIVE,),)
    CLASSES, COUNTS = 200, {"train": 5994, "test": 5794}

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Caltech-UCSD Birds-200-2011 with the official split.",
            features=features(self.CLASSES, PARTS),
            supervised_keys=("image", "label"),
            homepage="https://www.vision.caltech.edu/datasets/cub_200_2011/",
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        archive = os.path.join(os.fspath(dl_manager.manual_dir), ARCHIVE.name)
        tables = bird_tables.read_tables(archive, ROOT, PARTS)
        splits = (photo.split for photo in tables.photos.values())
        check_counts(archive, "CUB-200-2011", splits, self.COUNTS, len(tables.class_names), self.CLASSES)
        self.info.features["label"].names = tables.class_names
        return {split: self._generate_examples(archive, tables, split) for split in self.COUNTS}

    def _generate_examples(self, archive: str, tables: bird_tables.Tables, split: str) -> Iterator[tuple[str, dict]]:
        yield from bird_tables.generate(archive, tables, split, ROOT, "cub")
