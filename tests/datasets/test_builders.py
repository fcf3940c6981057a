"""The builders on miniature archives in the genuine layouts, and each trained on by its own configuration."""

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from cmd_jax.data.decode import decode_record
from cmd_jax.data.sources import Record, open_source
from cmd_jax.datasets import archives, prepared
from cmd_jax.datasets.builders import aircraft, cars, cub, nabirds
from cmd_jax.datasets.builders.examples import example
from cmd_jax.errors import BadImage, DatasetError
from cmd_jax.train_and_evaluate import train_and_evaluate
from tests.datasets import miniatures

CONFIGS = Path(__file__).parents[2] / "configs"


def _config(name, preset=""):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(preset)


def _open(tmp_path, source, split="train"):
    config = _config(source.split("/")[0]).data
    config.source, config.data_dir, config.manual_dir = source, str(tmp_path / "data"), str(tmp_path)
    return open_source(config, split)


def _sorted(source):
    return sorted((source[index] for index in range(len(source))), key=lambda record: record.name)


@pytest.mark.parametrize("name", miniatures.MAKE)
def test_a_miniature_is_prepared_and_trained_on_by_its_own_config(name, tmp_path, monkeypatch):
    miniatures.MAKE[name](tmp_path)
    miniatures.expect_miniature(monkeypatch, name)
    config = _config(name, "small")
    config.data.data_dir, config.data.manual_dir = str(tmp_path / "data"), str(tmp_path)
    config.train.epochs, config.optim.warmup_epochs, config.train.log_every_steps = 2.0, 0.0, 1
    config.views.global_px, config.views.local_count, config.head.prototypes = 32, 0, 32  # for the time of compilation
    train_and_evaluate(config, str(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    metrics = json.loads((tmp_path / "run" / "eval" / "2" / "metrics.json").read_text())
    assert "12 test queries, 36 train images" in metrics["protocol"]["rank1"]
    assert ("pointing_accuracy" in metrics["metrics"]) == (name in ("cub", "nabirds"))


@pytest.mark.parametrize("name", ["cub", "nabirds"])
def test_bird_tables(name, tmp_path, monkeypatch):
    miniatures.MAKE[name](tmp_path)
    miniatures.expect_miniature(monkeypatch, name)
    train, test = (_open(tmp_path, name, split) for split in ("train", "test"))
    leaves = ("Common Eider (Adult male)", "St. Vincent Parrot")
    assert train.class_names == {"cub": miniatures.SPECIES, "nabirds": leaves}[name]
    assert (len(train), len(test)) == (36, 12)
    by_number = {int(record.name[-8:-4]): record for record in _sorted(train) + _sorted(test)}
    assert sorted(by_number) == list(range(1, 49))
    assert all(record.label == number % 2 for number, record in by_number.items())
    np.testing.assert_allclose(decode_record(by_number[1])[0, 0], (44, 0, 255), atol=4)
    assert decode_record(by_number[2]).shape == (40, 60, 3)  # a grey one
    boxes = by_number[1].part_boxes
    # the one visible part: (y, x) = (10, 15) of 40 x 60, a square of 15 % of the longer side of the box, 30 px
    np.testing.assert_allclose(boxes[1], [(10 - 2.25) / 40, (15 - 2.25) / 60, (10 + 2.25) / 40, (15 + 2.25) / 60], rtol=1e-5)
    assert np.all(np.delete(boxes, 1, axis=0) == 0)
    assert boxes.shape == ({"cub": 15, "nabirds": 11}[name], 4)
    builder = prepared.open_builder(name, str(tmp_path / "data"), None)
    row = builder.as_data_source(split="test")[0]
    np.testing.assert_allclose(row["box"], [4 / 40, 6 / 60, 24 / 40, 36 / 60], rtol=1e-6)
    np.testing.assert_allclose(row["part_locations"][1], [10 / 40, 15 / 60, 1])


@pytest.mark.parametrize("combined", [False, True])
def test_cars_in_both_layouts(combined, tmp_path, monkeypatch):
    miniatures.make_cars(tmp_path, combined=combined)
    miniatures.expect_miniature(monkeypatch, "cars")
    train, test = (_open(tmp_path, "cars", split) for split in ("train", "test"))
    assert train.class_names == miniatures.MODELS
    assert (len(train), len(test)) == (36, 12)
    first = _sorted(train)[0]
    assert (first.name, first.label) == ("car_ims/000001.jpg" if combined else "cars_train/00001.jpg", 0)
    np.testing.assert_allclose(decode_record(first)[0, 0], (40, 0, 255), atol=4)
    assert [record.label for record in _sorted(test)[:4]] == [0, 1, 0, 1]
    row = prepared.open_builder("cars", str(tmp_path / "data"), None).as_data_source(split="train")[0]
    np.testing.assert_allclose(row["box"], [4 / 40, 6 / 60, 24 / 40, 36 / 60], rtol=1e-6)


@pytest.mark.parametrize("level", aircraft.LEVELS)
def test_aircraft_labels_of_every_level_and_no_banner(level, tmp_path, monkeypatch):
    miniatures.make_aircraft(tmp_path)
    miniatures.expect_miniature(monkeypatch, "aircraft")
    train = _open(tmp_path, "aircraft" if level == "variant" else f"aircraft/{level}")
    names = miniatures.LEVELS[aircraft.LEVELS[level]]
    assert train.class_names == names
    records = _sorted(train)
    assert [record.label for record in records[:5]] == [number % len(names) for number in range(5)]
    assert decode_record(records[0]).shape == (40, 60, 3)
    short = records[0]._replace(banner_px=60)
    with pytest.raises(BadImage, match=r"0000000\.jpg: 60 rows are all of the banner of 60"):
        decode_record(short)
    name = f"aircraft/{level}"
    row = prepared.open_builder(name, str(tmp_path / "data"), None).as_data_source(split="train")[0]
    np.testing.assert_allclose(row["box"], [4 / 40, 6 / 60, 24 / 40, 36 / 60], rtol=1e-6)  # of the 40 rows above the banner


def test_official_counts():
    counts = {builder: (builder.COUNTS["train"], builder.COUNTS["test"]) for builder in miniatures.BUILDERS.values()}
    assert list(counts.values()) == [(5994, 5794), (8144, 8041), (6667, 3333), (23_929, 24_633)]
    assert cub.Cub.CLASSES == 200
    assert cars.Cars.CLASSES == 196
    assert aircraft.Aircraft.CLASSES == {"variant": 100, "family": 70, "manufacturer": 30}
    assert nabirds.Nabirds.CLASSES == 555


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cub", r"lacks CUB_200_2011\.tgz from https://data\.caltech\.edu.*cmd_jax\.prepare cub downloads it.*manual_dir=DIR"),
        (
            "cars",
            r"lacks cars_train\.tgz and .*annos_withlabels\.mat from .*dead.*or instead car_ims\.tgz and cars_annos",
        ),
        ("aircraft", r"lacks fgvc-aircraft-2013b\.tar\.gz from https://www\.robots.*prepare aircraft downloads it"),
        ("nabirds", r"lacks nabirds\.tar\.gz from https://dl\.allaboutbirds\.org.*Remedy: put it there unchanged"),
    ],
)
def test_a_missing_archive_says_which_file_from_where_and_to_where(name, message, tmp_path):
    with pytest.raises(DatasetError, match=message):
        _open(tmp_path, name)


def test_a_damaged_archive_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    miniatures.expect_miniature(monkeypatch, "cub")
    path = tmp_path / cub.ARCHIVE.name
    files = miniatures.make_cub(tmp_path)

    def refused(message, changed):
        miniatures.pack(path, changed)
        with pytest.raises(DatasetError, match=message):
            _open(tmp_path, "cub")
        assert not list((tmp_path / "data").rglob("*.array_record*"))

    without = lambda name: {key: value for key, value in files.items() if key != f"{cub.ROOT}/{name}"}
    refused("lacks CUB_200_2011/parts/part_locs.txt", without("parts/part_locs.txt"))
    refused("lacks 1 images, first CUB_200_2011/images/0001/Some.Bird_0001.jpg", without("images/0001/Some.Bird_0001.jpg"))
    refused("tables do not fit together", files | {f"{cub.ROOT}/images.txt": "1 a.jpg\n"})
    names = files[f"{cub.ROOT}/image_class_labels.txt"].replace(" 2\n", " 1\n")
    refused("lists 1 classes, CUB-200-2011 has 2", files | {f"{cub.ROOT}/image_class_labels.txt": names})
    miniatures.make_cub(tmp_path, train=35)
    with pytest.raises(DatasetError, match="lists 35 train images, CUB-200-2011 has 36"):
        _open(tmp_path, "cub")
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(DatasetError, match="cannot be read"):
        _open(tmp_path, "cub")
    miniatures.make_cub(tmp_path)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DatasetError, match="cannot be read"):
        _open(tmp_path, "cub")
    broken = f"{cub.ROOT}/images/0001/Some.Bird_0001.jpg"
    miniatures.pack(path, files | {broken: b"no picture"})
    with pytest.raises(BadImage, match=r"0001/Some.Bird_0001\.jpg: not a readable picture"):
        _open(tmp_path, "cub")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_and_parts_follow_a_picture_that_decoding_turns(orientation):
    pixels = np.zeros((40, 64, 3), np.uint8)
    pixels[8:16, 24:40] = 255
    out, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(out, "jpeg", quality=100, exif=exif)
    box, parts = np.array([8.0, 24.0, 16.0, 40.0]), np.array([[12.0, 32.0, 1.0], [0.0, 0.0, 0.0]])
    name, content = example(out.getvalue(), 0, "a.jpg", box, parts)
    shown = decode_record(Record(out.getvalue(), 0, name, content["part_boxes"]))
    rows, columns = np.nonzero(shown[..., 0] > 127)
    found = np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1])
    scale = np.tile(shown.shape[:2], 2)
    np.testing.assert_allclose(content["box"] * scale, found, atol=1e-4)
    np.testing.assert_allclose(content["part_locations"][0, :2] * scale[:2], (found[:2] + found[2:]) / 2, atol=1e-4)
    centre = content["part_boxes"][0].reshape(2, 2).mean(0)
    np.testing.assert_allclose(centre, content["part_locations"][0, :2], atol=1e-5)
    assert np.all(content["part_boxes"][1] == 0)


def test_mat_files_that_are_none_or_have_no_labels(tmp_path, monkeypatch):
    miniatures.make_cars(tmp_path)
    miniatures.expect_miniature(monkeypatch, "cars")
    labels = tmp_path / cars.TEST_LABELS.name
    (name, content), *_ = archives.members(str(tmp_path / cars.DEVKIT.name), lambda name: name.endswith("cars_test_annos.mat"))
    assert name == "devkit/cars_test_annos.mat"
    labels.write_bytes(content)
    with pytest.raises(DatasetError, match=r"annotations have no field 'class', only .*fname; get the file with labels"):
        _open(tmp_path, "cars")
    labels.write_bytes(b"<html>404</html>")
    with pytest.raises(DatasetError, match=r"annotations cannot be read from a \.mat file"):
        _open(tmp_path, "cars")


def test_a_file_is_compared_with_what_is_registered(tmp_path):
    path = tmp_path / "a.tgz"
    path.write_bytes(b"abc")
    right = archives.Archive("a.tgz", "https://a.example", size=3, md5="900150983cd24fb0d6963f7d28e17f72")
    assert archives.check(str(path), right).startswith("ba7816bf")
    for wrong, message in (
        (right._replace(size=4), r"has 3 bytes, the genuine a.tgz has 4; download it again from https://a.example"),
        (right._replace(md5="00"), "has md5 9001"),
        (right._replace(sha256="00"), "has sha256 ba7816bf"),
    ):
        with pytest.raises(DatasetError, match=message):
            archives.check(str(path), wrong)


def test_leftovers_of_a_killed_preparation_are_removed(tmp_path, monkeypatch):
    miniatures.make_cub(tmp_path)
    miniatures.expect_miniature(monkeypatch, "cub")
    leftover = tmp_path / "data" / "cub" / "incomplete.ABC123_1.0.0"
    leftover.mkdir(parents=True)
    _open(tmp_path, "cub")
    assert not leftover.exists()
    assert (tmp_path / "data" / "cub" / "1.0.0").is_dir()
