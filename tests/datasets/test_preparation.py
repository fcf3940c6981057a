"""What `cmd_jax.prepare` does: download, counts, contact sheet, digests, and finding damage."""

import json
import subprocess

import numpy as np
import pytest
from PIL import Image

from cmd_jax import progress
from cmd_jax.data.sources import NO_BOXES, Record
from cmd_jax.datasets import preparation
from cmd_jax.datasets.views_figure import views_figure
from cmd_jax.errors import BadImage, ConfigError, DatasetError
from tests.datasets import miniatures


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    miniatures.make_cub(tmp_path)
    miniatures.expect(monkeypatch, "cub")

    def run(verify=False, draw_views=None):
        return preparation.prepare_dataset("cub", str(tmp_path / "data"), str(tmp_path), verify, 2, draw_views)

    run.directory = tmp_path / "data" / "cub" / "1.0.0"
    return run


def test_a_dataset_is_described(prepare, tmp_path, capsys):
    lines = prepare()
    text = capsys.readouterr().out
    for words in ("sha256 of CUB_200_2011.tgz", "cub train: 36/36 images", "counting test: 12/12 images, ", "took 0:00:0"):
        assert words in text, words
    assert lines[0] == "cub: 36 train, 12 test images, 2 classes"
    assert lines[1:3] == ["train: 18 images in every class", "test: 6 images in every class"]
    summary = json.loads((prepare.directory / "summary.json").read_text())
    assert summary["per_class"]["test"] == {"001.Black_footed_Albatross": 6, "002.Brewer_s_Blackbird": 6}
    done = subprocess.run(["sha256sum", tmp_path / miniatures.CUB_ARCHIVE], capture_output=True, text=True, check=True)
    assert summary["archives"] == {miniatures.CUB_ARCHIVE: done.stdout.split()[0]}
    subprocess.run(["sha256sum", "--check", "--strict", "manifest.sha256"], cwd=prepare.directory, check=True)
    with Image.open(prepare.directory / "contact_sheet.png") as sheet:
        assert sheet.size == (8 * 144, 5 * 158)  # 36 images
        assert np.ptp(np.asarray(sheet)) > 0


def test_a_second_call_does_nothing(prepare, tmp_path, capsys):
    first = prepare()
    (tmp_path / miniatures.CUB_ARCHIVE).unlink()
    before = {path: path.stat().st_mtime_ns for path in prepare.directory.iterdir()}
    capsys.readouterr()
    assert prepare() == first
    assert capsys.readouterr().out == ""
    assert {path: path.stat().st_mtime_ns for path in prepare.directory.iterdir()} == before
    (prepare.directory / "contact_sheet.png").unlink()
    prepare()
    assert (prepare.directory / "contact_sheet.png").exists()
    assert "all files and images are right" in prepare(verify=True)[-1]
    assert "decoding train: 36/36 images" in capsys.readouterr().out


def test_verify_finds_a_changed_file(prepare):
    prepare()
    (shard,) = prepare.directory.glob("*-test.array_record*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        DatasetError, match=r"1 of \d files are not what manifest.sha256 says, first cub-test.array_record.*remove"
    ):
        prepare(verify=True)


def test_verify_finds_a_image_that_cannot_be_decoded(tmp_path, monkeypatch):
    files = miniatures.make_cub(tmp_path)
    name = "CUB_200_2011/images/0001/Some.Bird_0003.jpg"
    miniatures.pack(tmp_path / miniatures.CUB_ARCHIVE, files | {name: files[name][:-40]})  # its head is whole
    miniatures.expect(monkeypatch, "cub")
    run = lambda verify: preparation.prepare_dataset("cub", str(tmp_path / "data"), str(tmp_path), verify, threads=2)
    with pytest.raises(BadImage, match=r"^0001/Some.Bird_0003.jpg: not a readable image.*\(1 of 48 images are bad\)"):
        run(verify=True)


def test_unknown_datasets_are_refused():
    for name in ("folder", "tfds:", "birds"):
        with pytest.raises(ConfigError, match=f"there is no dataset '{name}'; use one of synthetic_birds, cub, .*tfds:NAME"):
            preparation.prepare_dataset(name, "x", None, False, 1)


def test_the_views_are_drawn(prepare, tiny_config):
    assert "views.png" in prepare(draw_views=lambda source, config: Image.new("RGB", (2, 1)))[-1]
    assert (prepare.directory / "views.png").exists()
    tiny_config.views.local_count, tiny_config.data.canvas_px = 6, 128
    figure = views_figure([Record(miniatures.jpeg(1), 0, "a", NO_BOXES)], tiny_config)
    # the image of 40 x 60 px at the height of the two global views, and below two rows of local ones
    assert figure.size == (24 + 2 * 16 + 3 * 6, 16 + 2 * 8 + 3 * 6)
    assert (np.asarray(figure)[:16, :24, 2] < 100).any()  # red boxes of the global views on blue


def test_the_histogram_of_uneven_classes():
    per_class = {f"class {number}": 10 * number for number in range(1, 10)}
    lines = preparation.describe({"name": "x", "images": {"train": 450}, "classes": 9, "per_class": {"train": per_class}})
    assert lines[1] == "train: 10 (class 1) to 90 (class 9) images a class, median 50"
    assert len(lines) == 2 + preparation.BINS
    assert lines[2].split() == ["10-19", "images", "#" * 20, "1", "classes"]
    assert sum(int(line.split()[-2]) for line in lines[2:]) == 9


def test_progress_has_speed_and_time_left(monkeypatch, capsys):
    now = iter([0.0, 1.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    shown = progress.Progress("reading", 3_000_000, "bytes", done=1_000_000)
    for _ in range(2):
        shown.advance(600_000)
    shown.close()
    assert capsys.readouterr().out.splitlines() == [
        "reading: 2/3 MB, 0 MB/s, ETA 0:00:04",
        "reading: 2/3 MB, 0 MB/s, took 0:00:07",
    ]
    assert progress.clock(3723) == "1:02:03"
