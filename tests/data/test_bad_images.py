"""Unreadable images: replaced in training, left out of evaluations, reported once, counted and limited."""

import json
import re
import shutil

import numpy as np
import pytest

from cmd_jax.data.decode import BadImages
from cmd_jax.data.loader import CanvasCache, batches
from cmd_jax.errors import BadImage
from cmd_jax.evaluation import features
from cmd_jax.evaluation.features import extract_features
from cmd_jax.inference.run import Encoder
from cmd_jax.train_and_evaluate import train_and_evaluate
from tests.data.test_loader import Numbered, section, take


class Damaged(Numbered):
    """Images whose pixels are their index; those of `bad` cannot be decoded."""

    def __init__(self, count, bad, files=()):
        super().__init__(count, files)
        self.broken = set(bad)

    def __getitem__(self, index):
        record = super().__getitem__(index)
        return record._replace(encoded=b"x", name=f"photos/{index}.jpg") if int(index) in self.broken else record


def _flags(count):
    return np.zeros(count, np.uint32)


@pytest.mark.parametrize("kind", ["ram", "disk", "none"])
def test_the_next_image_takes_its_place(kind, tmp_path, capsys):
    config = section(cache=kind, cache_dir=str(tmp_path))
    whole = take(batches(CanvasCache(Numbered(2000), section(cache="none")), 2000, 300, 0, 0, 2), 7)
    for source, expected in ((Damaged(2000, [7, 8]), {7: 9, 8: 9}), (Damaged(2000, [1999]), {1999: 0})):
        cache = CanvasCache(source, config)
        found = take(batches(cache, 2000, 300, seed=0, first_step=0, threads=2), 7)
        for batch, good in zip(found, whole, strict=True):
            np.testing.assert_array_equal(batch.index, good.index)
            shown = [expected.get(index, index) for index in batch.index.tolist()]
            np.testing.assert_array_equal(batch.canvas[:, 0, 0, 0], np.array(shown).clip(max=255))
            np.testing.assert_array_equal(batch.size, good.size)
        said = capsys.readouterr().err.splitlines()
        assert sorted(line.split()[8] for line in said) == sorted(f"photos/{index}.jpg:" for index in expected)
        assert cache.bad.count == len(expected)
        for file in tmp_path.iterdir():
            file.unlink()


def test_the_disk_cache_remembers_bad_images(tmp_path, capsys):
    data = tmp_path / "data.bin"
    data.write_bytes(b"1")
    config = section(cache="disk", cache_dir=str(tmp_path / "cache"))
    first = CanvasCache(Damaged(20, [4], [data]), config)
    images = [first.load(index)[0].copy() for index in range(20)]
    assert capsys.readouterr().err.count("photos/4.jpg: not a readable image") == 1
    # The file would be readable now: what the run reads must stay what it was.
    later = CanvasCache(Numbered(20, [data]), config)
    assert later.bad.count == 1
    for index in range(20):
        np.testing.assert_array_equal(later.load(index)[0], images[index])
    np.testing.assert_array_equal(images[4], images[5])
    assert "4: was bad when" in capsys.readouterr().err


@pytest.mark.parametrize("processes", [1, 2])
def test_replacement_ignores_processes_and_first_step(processes):
    rows = []
    for process in range(processes):
        cache = CanvasCache(Damaged(40, [3]), section(cache="ram"))
        for first in (0, 5):
            parts = take(batches(cache, 40, 8, 1, first, 2, process, processes), 10 - first)
            rows.append((first, process, parts[5 - first :]))
    for start in (0, 5):
        parts = [parts for first, _, parts in rows if first == start]
        joined = [np.concatenate([part.canvas for part in step]) for step in zip(*parts, strict=True)]
        single = take(batches(CanvasCache(Damaged(40, [3]), section(cache="none")), 40, 8, 1, 5, 2), 5)
        for ours, theirs in zip(joined, single, strict=True):
            np.testing.assert_array_equal(ours, theirs.canvas)


@pytest.mark.parametrize(("images", "allowed"), [(2, 1), (1999, 1), (2000, 2), (5994, 5)])
def test_too_many_bad_images_stop_the_run(images, allowed, capsys):
    bad = BadImages(_flags(images), "left out")
    assert bad.allowed == allowed
    spread = range(0, images, max(1, images // (allowed + 1)))
    for index in spread[:allowed]:
        bad.note(index, f"photos/{index}.jpg: broken")
        bad.note(index, f"photos/{index}.jpg: broken")  # said and counted once
    assert bad.count == allowed
    assert len(capsys.readouterr().err.splitlines()) == allowed
    with pytest.raises(BadImage, match=rf"^photos/\d+\.jpg: broken; {allowed + 1} bad images of {images:,} are over the limit"):
        bad.note(spread[allowed], f"photos/{spread[allowed]}.jpg: broken")


def test_ten_bad_images_in_a_row_stop():
    bad = BadImages(_flags(100_000), "left out")
    order = [50, 52, 51, 53, 56, 55, 57, 58, 59]  # however they are met
    for index in order:
        bad.note(index, f"{index}: broken")
    with pytest.raises(BadImage, match=r"^54: broken; 10 images in a row are bad"):
        bad.note(54, "54: broken")
    cache = CanvasCache(Damaged(20_000, range(11, 21)), section(cache="none"))
    with pytest.raises(BadImage, match=r"^photos/20\.jpg: .*10 images in a row"):
        cache.load(11)


def test_only_bad_images():
    with pytest.raises(BadImage, match=r"^photos/0\.jpg: .*; 1 images in a row are bad"):
        CanvasCache(Damaged(1, [0]), section()).load(0)
    with pytest.raises(BadImage, match=r"; 2 bad images of 2 are over the limit of 1 "):
        CanvasCache(Damaged(2, [0, 1]), section()).load(0)


def test_a_run_with_bad_images(tiny_config, photo_folder, tmp_path, capsys):
    folder, workdir = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(photo_folder, folder)
    for name in ("train/a class/3.png", "test/b.class/0.png"):
        (folder / name).write_bytes(b"no image")
    tiny_config.data.source, tiny_config.data.folder = "folder", str(folder)
    train_and_evaluate(tiny_config, str(workdir))
    shown = capsys.readouterr()
    assert shown.err.count("bad image, the next one takes its place") == 1
    for name in ("train/a class/3.png", "test/b.class/0.png"):  # before the first step and after the last
        assert len(re.findall(f"left out of the evaluation: .*{name}: not a readable image", shown.err)) == 2
    assert "11 test queries, 23 train images" in shown.out
    assert "; left out as unreadable: 1 train, 1 test" in shown.out
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["bad_images"] for line in lines if "loss" in line] == [1] * 6
    content = json.loads((workdir / "eval" / "6" / "metrics.json").read_text())
    assert content["images_left_out"] == {"train": 1, "test": 1}
    assert all(protocol.endswith("unreadable: 1 train, 1 test") for protocol in content["protocol"].values())


class FirstPixel(Encoder):
    def program(self, outputs):
        return lambda params, images: dict.fromkeys(outputs, images[:, 0, 0, :1])


def _extracted(config, source):
    """Features that are the first pixel of the crop, so the index of the image."""
    config.eval.update(resize_px=8, crop_px=8, resize_mode="shorter_side", interpolation="bicubic")
    return extract_features(FirstPixel(config, backbone=None, params={}), source)


@pytest.mark.parametrize("bad", [[0], [19]])
def test_evaluation_leaves_bad_images_out(bad, tiny_config):
    found = _extracted(tiny_config, Damaged(20, bad))
    kept = [index for index in range(20) if index not in bad]
    assert found.indices.tolist() == found.features[:, 0].tolist() == kept
    assert found.names == tuple(Damaged(20, [])[index].name for index in kept)
    assert found.labels.tolist() == [Damaged(20, [])[index].label for index in kept]
    assert len(found.boxes) == len(found.mil_weights) == 19


def test_evaluation_stops_at_the_same_limit(tiny_config):
    with pytest.raises(BadImage, match=r"^photos/9\.jpg: .*; 2 bad images of 20 are over the limit of 1 \(0\.1 %\): repair"):
        _extracted(tiny_config, Damaged(20, [3, 9]))


def test_the_limit_counts_all_processes(tiny_config, monkeypatch):
    # This process has met one bad image, and another process a second one.
    monkeypatch.setattr(features, "gather", lambda tree, count: tree | {"readable": ~np.isin(np.arange(count), (3, 9))})
    with pytest.raises(BadImage, match=r"images of this split cannot be read; 2 bad images of 20 are over the limit"):
        _extracted(tiny_config, Damaged(20, [3]))
