"""Digests of a folder: written once, read by sha256sum, and every change of a file is found."""

import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from cmd_jax.data.decode import decode_rgb
from cmd_jax.datasets import manifest
from cmd_jax.datasets.preparation import prepare_folder
from cmd_jax.errors import BadImage, ConfigError, DatasetError


@pytest.fixture
def folder(photo_folder, tmp_path):
    shutil.copytree(photo_folder, tmp_path / "photos")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos" / "train" / "a class" / "odd\\name\n.jpg")
    return tmp_path / "photos"


def test_sha256sum_reads_the_manifest(folder):
    before = sorted(folder.rglob("*"))
    lines = prepare_folder(str(folder), False, 2)
    assert lines[0] == f"{folder}: 25 train, 12 test images, 3 classes"
    assert lines[-1] == f"wrote {folder / 'manifest.sha256'}; not verified (--verify compares files and decodes images)"
    assert sorted(folder.rglob("*")) == sorted([*before, folder / "manifest.sha256"])
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "manifest.sha256"], cwd=folder, check=True)
    assert len((folder / "manifest.sha256").read_text().splitlines()) == 37
    written = (folder / "manifest.sha256").read_bytes()
    assert "all files and images are right" in prepare_folder(str(folder), True, 2)[-1]
    assert (folder / "manifest.sha256").read_bytes() == written


def test_flipped_bits_are_found(folder):
    prepare_folder(str(folder), False, 2)
    (path,) = folder.rglob("*.jpg")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-40] ^= 1
    path.write_bytes(flipped)
    assert not np.array_equal(decode_rgb(bytes(flipped), "x"), decode_rgb(whole, "x"))  # silently another image
    with pytest.raises(
        DatasetError, match=r"1 of 37 files are not what manifest\.sha256 says, first train/a class/odd.*\(has changed\); rest"
    ):
        prepare_folder(str(folder), True, 2)
    path.write_bytes(whole)
    prepare_folder(str(folder), True, 2)


@pytest.mark.parametrize("how", ["is missing", "is new"])
def test_other_files_are_found(folder, how):
    prepare_folder(str(folder), False, 2)
    path = folder / "test" / "b.class" / "0.png"
    path.unlink() if how == "is missing" else shutil.copy(path, path.with_name("00.png"))
    with pytest.raises(DatasetError, match=rf"1 of 37 files .* first test/b\.class/00?\.png \({how}\)"):
        prepare_folder(str(folder), True, 2)


@pytest.mark.parametrize("line", ["no digest", "ab  a.png", "\xff\xfe", "  a.png"])
def test_a_damaged_manifest_is_named(folder, line):
    (folder / "manifest.sha256").write_text(f"{'0' * 64}  a.png\n{line}\n", encoding="latin-1")
    with pytest.raises(DatasetError, match=r"manifest\.sha256: line 2 is not a digest and a name; restore the file"):
        prepare_folder(str(folder), True, 2)


def test_unreadable_images_and_missing_folders(folder):
    (folder / "train" / "b.class" / "1.png").write_bytes(b"no image")
    prepare_folder(str(folder), False, 2)
    with pytest.raises(BadImage, match=r"train/b\.class/1\.png: not a readable image .*\(1 of 37 images are bad\)"):
        prepare_folder(str(folder), True, 2)
    with pytest.raises(ConfigError, match="is not a directory"):
        prepare_folder(str(folder / "none"), False, 2)


def test_unwritable_directories_are_named(folder, monkeypatch):
    (folder / "manifest.sha256").mkdir()
    with pytest.raises(
        DatasetError, match=r"manifest\.sha256 cannot be written \(Is a directory\); make the directory writable"
    ):
        manifest.write(str(folder), [], "nothing")
