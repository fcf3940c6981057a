"""TFDS builder of NABirds over the genuine archive; no TensorFlow.

Van Horn, Branson, Farrell, Haber, Barry, Ipeirotis, Perona, Belongie: Building a bird recognition app and large scale
dataset with citizen scientists, CVPR 2015.
"""

import os
from collections.abc import Iterator

import tensorflow_datasets as tfds

from cmd_jax.datasets.archives import Archive
from cmd_jax.datasets.builders import bird_tables
from cmd_jax.datasets.builders.examples import check_counts, features

ROOT, PARTS = "nabirds", 11
ARCHIVE = Archive(
    "nabirds.tar.gz",
    "https://dl.allaboutbirds.org/nabirds (9 GB; its terms must be agreed to, so no program can fetch it)",
    md5="df21a9e4db349a14e2b08adfd45873bd",
)


class Nabirds(tfds.core.GeneratorBasedBuilder):
    """NABirds: 555 visual categories of North American birds with boxes and 11 part locations."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Put {ARCHIVE.name} from {ARCHIVE.source}, unchanged, into the manual directory."
    LAYOUTS = ((ARCHIVE,),)
    CLASSES, COUNTS = 555, {"train": 23_929, "test": 24_633}

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="NABirds with the official split; classes are the leaves of its hierarchy that have photos.",
            features=features(self.CLASSES, PARTS),
            supervised_keys=("image", "label"),
            homepage="https://dl.allaboutbirds.org/nabirds",
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        archive = os.path.join(os.fspath(dl_manager.manual_dir), ARCHIVE.name)
        tables = bird_tables.read_tables(archive, ROOT, PARTS)
        splits = (photo.split for photo in tables.photos.values())
        check_counts(archive, "NABirds", splits, self.COUNTS, len(tables.class_names), self.CLASSES)
        self.info.features["label"].names = tables.class_names
        return {split: self._generate_examples(archive, tables, split) for split in self.COUNTS}

    def _generate_examples(self, archive: str, tables: bird_tables.Tables, split: str) -> Iterator[tuple[str, dict]]:
        yield from bird_tables.generate(archive, tables, split, ROOT, "nabirds")
