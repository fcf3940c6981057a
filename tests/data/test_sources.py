"""Datasets of TFDS, other data to evaluate on, and fingerprints of a source."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cmd_jax.data.decode import decode_record
from cmd_jax.data.folder import FolderSource
from cmd_jax.data.sources import eval_section, fingerprint
from cmd_jax.datasets.prepared import open_source
from cmd_jax.errors import ConfigError, DatasetError, NoLabels
from cmd_jax.evaluation.splits import open_labelled_splits


def test_a_missing_folder_is_named(tiny_config):
    tiny_config.data.source, tiny_config.data.folder = "folder", "/no/such/place"
    with pytest.raises(ConfigError, match="'/no/such/place' is not a directory"):
        open_source(tiny_config.data, "train")


class OtherFlowers(tfds.core.GeneratorBasedBuilder):
    """Somebody else's dataset: other names of features, a validation split, no ids."""

    VERSION = tfds.core.Version("2.1.0")
    TRAIN = 5

    def _info(self):
        features = {
            "depth": tfds.features.Scalar(np.float32),
            "photo": tfds.features.Image(shape=(None, None, 3)),
            "season": tfds.features.ClassLabel(names=["spring"]),
            "kind": tfds.features.ClassLabel(names=["rose", "tall fern"]),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), supervised_keys=("photo", "kind"), homepage="", description=""
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(self.TRAIN), "validation": self._generate_examples(2)}

    def _generate_examples(self, count):
        for number in range(count):
            out = io.BytesIO()
            Image.new("RGB", (5, 4), (number, 0, 9)).save(out, "png")
            out.seek(0)
            yield number, {"depth": 1.0, "photo": out, "season": 0, "kind": number % 2}


class NoImages(OtherFlowers):
    """A dataset without images."""

    def _info(self):
        features = tfds.features.FeaturesDict({"depth": tfds.features.Scalar(np.float32)})
        return self.dataset_info_from_configs(features=features, homepage="", description="")

    def _generate_examples(self, count):
        for number in range(count):
            yield number, {"depth": 1.0}


class NeedsMore(OtherFlowers):
    """A dataset whose preparation fails as those do that need TensorFlow."""

    def _split_generators(self, dl_manager):
        raise ImportError("No module named 'tensorflow'")


def test_any_dataset_of_tfds_by_name(tiny_config, tmp_path):
    tiny_config.data.source, tiny_config.data.data_dir = "tfds:other_flowers", str(tmp_path)
    train, test = (open_source(tiny_config.data, split) for split in ("train", "test"))
    assert train.class_names == ("rose", "tall fern")
    assert (len(train), len(test)) == (5, 2)
    pixels = sorted((decode_record(train[index])[0, 0].tolist(), train[index].label) for index in range(5))
    assert pixels == [([number, 0, 9], number % 2) for number in range(5)]
    assert test[1].name == "other_flowers/test/1"
    assert len(open_labelled_splits(tiny_config).test) == 2


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("no_such_flowers", ConfigError, "'tfds:no_such_flowers', which TFDS neither knows"),
        ("no_images", ConfigError, "'tfds:no_images', which has no image among depth"),
        (
            "needs_more",
            DatasetError,
            "could not be prepared here .*No module named 'tensorflow'.* `tfds build needs_more",
        ),
    ],
)
def test_a_dataset_of_tfds_that_cannot_be_used(name, error, message, tiny_config, tmp_path):
    tiny_config.data.source, tiny_config.data.data_dir = f"tfds:{name}", str(tmp_path)
    with pytest.raises(error, match=message):
        open_source(tiny_config.data, "train")


def test_a_dataset_without_random_access_is_refused(tiny_config, tmp_path):
    tiny_config.data.source, tiny_config.data.data_dir = "tfds:other_flowers", str(tmp_path)
    open_source(tiny_config.data, "train")
    info = tmp_path / "other_flowers" / "2.1.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DatasetError, match=r"is not in random-access files; .* `tfds build other_flowers"):
        open_source(tiny_config.data, "train")


def test_evaluation_may_have_other_data(tiny_config, photo_folder, tmp_path):
    data = tiny_config.data
    data.source, data.folder = "folder", str(photo_folder / "train")  # without labels
    with pytest.raises(NoLabels, match=r"has no labels; .* or name labelled data: --config\.data\.eval_source=NAME"):
        open_labelled_splits(tiny_config)
    data.eval_folder = str(photo_folder)
    assert [len(split) for split in open_labelled_splits(tiny_config)] == [24, 12]
    assert eval_section(data).source == "folder"
    data.eval_source, data.eval_folder, data.data_dir = "tfds:other_flowers", None, str(tmp_path)
    assert [len(split) for split in open_labelled_splits(tiny_config)] == [5, 2]
    data.eval_source, data.eval_folder = None, str(photo_folder / "train")
    with pytest.raises(ConfigError, match="has no labels") as caught:
        open_labelled_splits(tiny_config)
    assert not isinstance(caught.value, NoLabels)  # it was named: training does not go on without it


def test_the_fingerprint_follows_the_files(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"x")
    prints = [fingerprint(FolderSource(str(tmp_path), "train"))]
    prints.append(fingerprint(FolderSource(str(tmp_path), "train")))
    (tmp_path / "b.jpg").write_bytes(b"other")
    prints.append(fingerprint(FolderSource(str(tmp_path), "train")))
    (tmp_path / "c.jpg").write_bytes(b"x")
    prints.append(fingerprint(FolderSource(str(tmp_path), "train")))
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
