"""Folders and datasets of TFDS: labelled, unlabelled, other data to evaluate on, and the mistakes people make."""

import io
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cmd_jax.config import ConfigError
from cmd_jax.data import sources
from cmd_jax.data.decode import decode_record
from cmd_jax.data.errors import BadImage, DatasetError
from cmd_jax.data.sources import UNLABELLED, FolderSource, eval_section, fingerprint, open_source
from cmd_jax.evaluation.splits import NoLabels, open_labelled_splits


def test_labelled_folder(photo_folder):
    train, test = FolderSource(str(photo_folder), "train"), FolderSource(str(photo_folder), "test")
    assert train.class_names == test.class_names == ("<script>", "a class", "b.class")
    assert (len(train), len(test)) == (24, 12)
    assert [test[index].label for index in (0, 4, 8)] == [0, 1, 2]
    assert test[0].name.endswith(os.path.join("<script>", "0.png"))
    assert test[0].part_boxes.shape == (0, 4)


def test_flat_folder_is_unlabelled_and_searched_at_any_depth(photo_folder, tmp_path):
    flat = FolderSource(str(photo_folder / "train" / "a class"), "train")
    assert (len(flat), flat.class_names, flat[0].label) == (8, (), UNLABELLED)
    assert len(FolderSource(str(photo_folder / "train"), "train")) == 24
    assert len(FolderSource(str(photo_folder / "train"), "test")) == 0


def _make(root, *names):
    for name in names:
        os.makedirs(root / os.path.dirname(name), exist_ok=True)
        (root / name).write_bytes(b"x")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "holds no images"),
        (("train/a/1.txt",), "class folder .*a holds no images"),
        (("train/a/1.jpg", "train/b/notes.txt"), "class folder .*b holds no images"),
        (("train/a/1.jpg", "test/z/1.jpg"), "classes that train/ has not: z"),
        (("train/a/1.jpg", "test/1.jpg"), "test has 1 images beside its class folders, first 1.jpg"),
        (
            ("train/a/1.jpg", "train/1.jpg", "train/0.png"),
            "train has 2 images beside its class folders, first 0.png; move them",
        ),
        (("train/a/1.jpg", "train/b/1.jpg", "test/a/1.jpg"), "class folder .*test/b holds no images"),
        (("Train/a/1.jpg", "test/a/1.jpg"), "has test/ but no train/; put the training images into .*train"),
    ],
)
def test_unusable_folders_are_named(tmp_path, files, message):
    _make(tmp_path, *files)
    with pytest.raises(ConfigError, match=message):
        [FolderSource(str(tmp_path), split) for split in ("train", "test")]


def test_files_that_cannot_be_read_are_found_before_training(tmp_path):
    _make(tmp_path, "train/a/1.jpg", "train/a/2.jpg", "train/b/1.jpg")
    (tmp_path / "train" / "a" / "0.jpg").symlink_to(tmp_path / "gone")
    with pytest.raises(DatasetError, match=r"train: 1 of 4 images cannot be read, first .*a/0\.jpg; make them readable"):
        FolderSource(str(tmp_path), "train")


@pytest.fixture
def nobody():
    """The rights of a user who owns nothing, for a test that root runs too; a directory that it may look into."""
    root = tempfile.mkdtemp()
    os.chmod(root, 0o755)
    real, _, _ = os.getresuid()
    if not real:
        os.setresuid(65534, 65534, 0)
    yield Path(root)
    os.setresuid(real, real, real)
    for path in Path(root).rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(root)


def test_permissions(nobody):
    def owned(*names):
        os.setresuid(-1, os.getresuid()[2], -1)  # makes the files
        _make(nobody, *names)

    owned("train/a/1.jpg", "train/a/2.jpg", "train/b/1.jpg", "flat/1.jpg")
    closed = [nobody / "train" / "a" / "2.jpg", nobody / "train" / "b", nobody / "train"]
    source = FolderSource(str(nobody), "train")
    messages = [
        r"train: 1 of 3 images cannot be read, first .*a/2\.jpg; make them readable",
        r"directory .*train/b cannot be read \(Permission denied\)",
        r"directory .*train cannot be read \(Permission denied\)",
    ]
    for path, message in zip(closed, messages, strict=True):
        mode = path.stat().st_mode
        path.chmod(0)
        os.setresuid(-1, os.getresuid()[0], -1)
        with pytest.raises(DatasetError, match=message):
            FolderSource(str(nobody), "train")
        if path == closed[0]:  # after the start of training
            with pytest.raises(BadImage, match=r"a/2\.jpg: cannot be read \(Permission denied\)"):
                source[1]
        os.setresuid(-1, os.getresuid()[2], -1)
        path.chmod(mode)


def test_what_is_no_plain_file_is_a_bad_image(tmp_path, monkeypatch):
    _make(tmp_path, "2.jpg", "3.jpg")
    os.mkfifo(tmp_path / "1.jpg")
    source = FolderSource(str(tmp_path), "train")
    with pytest.raises(BadImage, match=r"1\.jpg: is no file but a pipe, device or directory"):
        source[0]
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 0)
    with pytest.raises(BadImage, match=r"2\.jpg: 1 bytes are over the limit of 0; remove it"):
        source[1]
    (tmp_path / "3.jpg").unlink()
    with pytest.raises(BadImage, match=r"3\.jpg: cannot be read \(No such file or directory\)"):
        source[2]


def test_links_to_classes_and_images_are_followed_and_circles_are_not(tmp_path):
    _make(tmp_path, "elsewhere/1.jpg", "elsewhere/2.jpg", "photos/train/b/1.jpg")
    (tmp_path / "photos" / "train" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "train" / "b" / "2.jpg").symlink_to(tmp_path / "elsewhere" / "2.jpg")
    (tmp_path / "photos" / "train" / "b" / "circle").symlink_to(tmp_path / "photos")
    source = FolderSource(str(tmp_path / "photos"), "train")
    assert source.class_names == ("a", "b")
    assert source.labels == [0, 0, 1, 1]


def test_names_that_would_command_a_terminal_are_spelled_out(tmp_path):
    names = ["\x1b[31mred", "two\nlines", "$x^2$", "\u202ebackwards", os.fsdecode(b"\xff"), "日本"]
    _make(tmp_path, *(f"train/{name}/\x07.png" for name in names))
    source = FolderSource(str(tmp_path), "train")
    assert sorted(source.class_names) == sorted([r"\x1b[31mred", r"two\nlines", "$x^2$", r"\u202ebackwards", r"\udcff", "日本"])
    assert all(source[index].name.isprintable() for index in range(len(source)))
    with pytest.raises(BadImage) as caught:
        decode_record(source[0])
    assert str(caught.value).isprintable()


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


class NoPictures(OtherFlowers):
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
        ("no_pictures", ConfigError, "'tfds:no_pictures', which has no image among depth"),
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
    _make(tmp_path, "a.jpg", "b.jpg")
    prints = [fingerprint(FolderSource(str(tmp_path), "train"))]
    prints.append(fingerprint(FolderSource(str(tmp_path), "train")))
    (tmp_path / "b.jpg").write_bytes(b"other")
    prints.append(fingerprint(FolderSource(str(tmp_path), "train")))
    _make(tmp_path, "c.jpg")
    prints.append(fingerprint(FolderSource(str(tmp_path), "train")))
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
