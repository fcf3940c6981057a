"""A folder of the user's: splits, classes, links, what is left out, and the mistakes people make."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from cmd_jax.data import listing
from cmd_jax.data.decode import decode_record
from cmd_jax.data.folder import FolderSource
from cmd_jax.data.listing import find_images
from cmd_jax.data.sources import UNLABELLED
from cmd_jax.errors import BadImage, ConfigError, DatasetError
from cmd_jax.inference.preprocess import folder_images, separate


def test_labelled_folder(photo_folder):
    train, test = FolderSource(str(photo_folder), "train"), FolderSource(str(photo_folder), "test")
    assert train.class_names == test.class_names == ("<script>", "a class", "b.class")
    assert (len(train), len(test)) == (24, 12)
    assert [test[index].label for index in (0, 4, 8)] == [0, 1, 2]
    assert test[0].name.endswith(os.path.join("<script>", "0.png"))
    assert test[0].part_boxes.shape == (0, 4)


def test_flat_folders_are_unlabelled(photo_folder, tmp_path):
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
        (("train/a/1.jpg", "test/z/1.jpg"), "classes that train/ does not have: z"),
        (("train/a/1.jpg", "test/1.jpg"), "test has 1 images beside its class folders, first 1.jpg"),
        (
            ("train/a/1.jpg", "train/1.jpg", "train/0.png"),
            "train has 2 images beside its class folders, first 0.png; move them",
        ),
        (("train/a/1.jpg", "train/b/1.jpg", "test/a/1.jpg"), "class folder .*test/b holds no images"),
        (("test/a/1.jpg",), "has test/ but no train/; put the training images into .*train"),
        (("Validation/a/1.jpg", "b/1.jpg"), "has Validation/ but no train/"),
        (
            ("train/a/1.jpg", "Train/a/1.jpg"),
            "has Train/ and train/, which are both the train split; merge",
        ),
        (("train/a/1.jpg", "val/a/1.jpg", "valid/a/1.jpg"), "which are both the val split"),
        (
            ("up/cars/train/a/1.jpg", "up/cars/Test/a/1.jpg", "1.jpg"),
            r"has no train/ itself, but up/cars/ in it has, .*; set data\.folder to .*/up/cars$",
        ),
        (("train/a/1.heic", "train/b/1.jpg"), r"class folder .*a holds no images \(not read: 1 file \(1 \.heic\)\); fill"),
        (("1.heic", ".hidden/1.jpg"), r"holds no images \(not read: 1 file \(1 \.heic\); left out: 1 folder \(1 \.hidden\)\)"),
        (
            ("train/a/1.jpg", "train/b/c/1.jpg"),
            r"a/ holds images itself, but b/ only in folders below it \(b/c/\), so it is not clear which",
        ),
        (("train/a/x/1.jpg", "train/b/y/1.jpg", "train/b/z/1.txt"), "class folder .*train/b/z holds no images"),
        (("train/a/x/1.jpg", "train/b/y/1.jpg", "test/a/x/1.jpg"), "class folder .*test/b/y holds no images"),
        (("train/a/x/1.jpg", "test/a/1.jpg", "test/a/x/1.jpg"), "classes that train/ does not have: a;"),
        (("train/a/x/1.jpg", "test/a/x/1.jpg", "test/a/z/1.jpg"), "classes that train/ does not have: a/z;"),
        (
            ("train/Apple/1.jpg", "train/apple/1.jpg"),
            "the classes 'Apple' and 'apple', which are equal but for upper and lower",
        ),
        (
            ("train/caf\u00e9/1.jpg", "train/cafe\u0301/1.jpg"),
            r"'.*' \(cafe\\u0301\) and '.*' \(caf\\xe9\), which are equal but for Unicode normalization; merge",
        ),
        (
            ("train/caf\u00e9/1.jpg", "test/cafe\u0301/1.jpg"),
            r"test has the class '.*' \(cafe\\u0301\), which train/ spells '.*' \(caf\\xe9\): equal but for Unicode",
        ),
        (("train/Apple/1.jpg", "test/apple/1.jpg"), "'apple', which train/ spells 'Apple': equal but for upper and lower case"),
    ],
)
def test_unusable_folders_are_named(tmp_path, files, message):
    _make(tmp_path, *files)
    with pytest.raises(ConfigError, match=message):
        [FolderSource(str(tmp_path), split) for split in ("train", "test")]


def test_unreadable_files_are_found_before_training(tmp_path):
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


def test_pipes_and_large_files_are_bad_images(tmp_path, monkeypatch):
    _make(tmp_path, "2.jpg", "3.jpg")
    os.mkfifo(tmp_path / "1.jpg")
    source = FolderSource(str(tmp_path), "train")
    with pytest.raises(BadImage, match=r"1\.jpg: is not a regular file but a pipe, device or directory"):
        source[0]
    monkeypatch.setattr(listing, "MAX_FILE_BYTES", 0)
    with pytest.raises(BadImage, match=r"2\.jpg: 1 bytes are over the limit of 0; remove it"):
        source[1]
    (tmp_path / "3.jpg").unlink()
    with pytest.raises(BadImage, match=r"3\.jpg: cannot be read \(No such file or directory\)"):
        source[2]


def test_links_are_followed_and_circles_end(tmp_path):
    _make(tmp_path, "elsewhere/1.jpg", "elsewhere/deep/2.jpg", "photos/train/b/1.jpg")
    train = tmp_path / "photos" / "train"
    for name, target in {"a": "elsewhere", "b/2.jpg": "elsewhere/1.jpg", "b/more": "elsewhere/deep"}.items():
        (train / name).symlink_to(tmp_path / target)
    (train / "b" / "circle").symlink_to(tmp_path / "photos")
    (tmp_path / "elsewhere" / "deep" / "circle").symlink_to(tmp_path / "elsewhere")
    (train / "b" / "itself").symlink_to("itself")
    source = FolderSource(str(tmp_path / "photos"), "train")
    found = [os.path.relpath(path, train) for path in source.paths]
    assert found == ["a/1.jpg", "a/deep/2.jpg", "b/1.jpg", "b/2.jpg", "b/more/2.jpg", "b/more/circle/1.jpg"]
    assert (source.class_names, source.labels) == (("a", "b"), [0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("train", "test", "notes"),
    [
        ("train", "test", ("", "")),
        ("TRAIN", "Testing", ("read from TRAIN/", "read from Testing/")),
        ("training", "valid", ("read from training/", "read from valid/")),
        ("train", "VAL", ("", "read from VAL/")),
        ("train", "validation", ("", "read from validation/")),
    ],
)
def test_names_of_splits(train, test, notes, tmp_path):
    _make(tmp_path, f"{train}/a/1.jpg", f"{train}/a/2.jpg", f"{test}/a/3.jpg", "1.jpg")
    splits = [FolderSource(str(tmp_path), split) for split in ("train", "test")]
    assert [[os.path.relpath(path, source.root) for path in source.paths] for source in splits] == [
        [f"{train}/a/1.jpg", f"{train}/a/2.jpg"],
        [f"{test}/a/3.jpg"],
    ]
    assert tuple(source.note for source in splits) == notes
    shutil.rmtree(tmp_path / test)
    without = FolderSource(str(tmp_path), "test")
    assert (len(without), without.class_names) == (0, ("a",))
    if test == "test":
        _make(tmp_path, "test/a/3.jpg")
        _make(tmp_path, "val/a/4.jpg")
        both = FolderSource(str(tmp_path), "test")
        assert (both.paths, both.note) == (splits[1].paths, "val/ is not used")


def test_nested_classes_are_the_folders_that_hold_images(tmp_path):
    names = ("fruit/apple/pink lady", "fruit/apple/gala", "fruit/kiwi", "milk/arla")
    _make(tmp_path, *(f"{split}/{name}/{number}.jpg" for split in ("train", "test") for name in names for number in (1, 2)))
    _make(tmp_path, "train/fruit/kiwi/cut/3.jpg", "test/fruit/kiwi/other/4.jpg")  # below a class, so of it
    train, test = (FolderSource(str(tmp_path), split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("gala", "pink lady", "kiwi", "arla")
    assert train.labels == test.labels == [0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert train.note == "each of the 4 folders that hold images is a class, fruit/apple/gala/ is gala"
    _make(tmp_path, *(f"{split}/milk/Gala/1.jpg" for split in ("train", "test")))  # the second of this name
    names = ("fruit/apple/gala", "fruit/apple/pink lady", "fruit/kiwi", "milk/Gala", "milk/arla")
    assert FolderSource(str(tmp_path), "test").class_names == names


def test_order_and_images_below_a_class(tmp_path):
    _make(tmp_path, "train/a b/1.jpg", "train/a/x y/1.jpg", "train/a/x/2.jpg", "train/a/z.jpg")
    source = FolderSource(str(tmp_path), "train")
    assert [os.path.relpath(path, tmp_path / "train") for path in source.paths] == [
        "a/x y/1.jpg",
        "a/x/2.jpg",
        "a/z.jpg",
        "a b/1.jpg",
    ]
    assert (source.class_names, source.labels, source.note) == (("a", "a b"), [0, 0, 0, 1], "")


def test_unprintable_names_are_escaped(tmp_path):
    names = ["\x1b[31mred", "two\nlines", "$x^2$", "\u202ebackwards", os.fsdecode(b"\xff"), "日本"]
    _make(tmp_path, *(f"train/{name}/\x07.png" for name in names))
    source = FolderSource(str(tmp_path), "train")
    assert sorted(source.class_names) == sorted([r"\x1b[31mred", r"two\nlines", "$x^2$", r"\u202ebackwards", r"\udcff", "日本"])
    assert all(source[index].name.isprintable() for index in range(len(source)))
    with pytest.raises(BadImage) as caught:
        decode_record(source[0])
    assert str(caught.value).isprintable()


def test_files_and_folders_left_out(tmp_path):
    kept = ("1.jpg", "a/2.JPEG", "a/3.jfif", "b/4.gif", "b/5.webp")
    ours = ("run/config.json", "run/checkpoints/4/x.png", "run/report/mil_overlays.png", "copied/mil_overlays.png")
    ours += ("cub/dataset_info.json", "cub/features.json", "cub/contact_sheet.png")
    others = (".thumbnails/1.png", "a/.ipynb_checkpoints/1.png", "b/.ipynb_checkpoints/1.png", "@eaDir/1.jpg/THUMB.jpg")
    others += ("$RECYCLE.BIN/1.jpg", "lost+found/1.jpg", "__MACOSX/a/1.jpg", "cards/.nomedia", "cards/1.jpg")
    unread = ("1.HEIC", "a/2.heic", "a/3.cr2", "b/4")
    silent = (".DS_Store", "._1.jpg", "Thumbs.db", "labels.csv", "manifest.sha256", "a/note.txt")
    _make(tmp_path, *kept, *ours, *others, *unread, *silent)
    source = FolderSource(str(tmp_path), "train")
    assert [os.path.relpath(path, source.root) for path in source.paths] == list(kept)
    assert source.note == (
        "not read: 4 files (2 .heic, 1 .cr2, 1 without an ending); left out: 11 folders (2 .ipynb_checkpoints, 1 $RECYCLE.BIN, "
        "1 .thumbnails, 1 @eaDir, 1 __MACOSX, 1 lost+found, ...)"
    )
    assert folder_images(str(tmp_path)).paths == list(kept)  # of `embed`
    assert separate(tmp_path) == source.paths  # of the Python interface


def test_a_run_in_the_folder_itself(tmp_path):
    _make(tmp_path, "1.jpg", "report/index.html")
    _make(tmp_path, "config.json", "checkpoints/4/1.png", "eval/4/1.png", "report/mil_overlays.png", "tb/events.out.tfevents.1")
    assert find_images(str(tmp_path)) == listing.Listing(["1.jpg"], [], {}, {})


def test_a_relative_folder_is_read_from_anywhere(tmp_path, monkeypatch):
    _make(tmp_path, "photos/1.jpg")
    monkeypatch.chdir(tmp_path)
    source = FolderSource("photos/", "train")
    monkeypatch.chdir("/")
    assert (source.root, source[0].encoded) == (str(tmp_path / "photos"), b"x")
