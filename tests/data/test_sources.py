"""Folders: labelled, unlabelled, and the mistakes people make with them."""

import os

import pytest

from cmd_jax.config import ConfigError
from cmd_jax.data.sources import UNLABELLED, FolderSource, open_source


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
    ],
)
def test_unusable_folders_are_named(tmp_path, files, message):
    _make(tmp_path, *files)
    with pytest.raises(ConfigError, match=message):
        [FolderSource(str(tmp_path), split) for split in ("train", "test")]


def test_a_missing_folder_is_named(tiny_config):
    tiny_config.data.source, tiny_config.data.folder = "folder", "/no/such/place"
    with pytest.raises(ConfigError, match="'/no/such/place' is not a directory"):
        open_source(tiny_config.data, "train")
