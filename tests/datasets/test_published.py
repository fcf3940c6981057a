"""Published datasets from miniature archives in the genuine layouts."""

import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import ExifTags, Image

from cmd_jax.config import SOURCES, default
from cmd_jax.data.decode import decode_record
from cmd_jax.data.sources import Record
from cmd_jax.datasets import aircraft, archives, cars
from cmd_jax.datasets.dataset import Annotation, example
from cmd_jax.datasets.prepared import DATASETS, ensure_prepared, open_source
from cmd_jax.errors import BadImage, DatasetError
from cmd_jax.train_and_evaluate import train_and_evaluate
from tests.datasets import miniatures


def _section(directory, name):
    section = default().data
    section.source, section.data_dir, section.manual_dir = name, str(directory / "data"), str(directory)
    return section


def _open(directory, name):
    return [open_source(_section(directory, name), split) for split in ("train", "test")]


def _row(directory, name, split="test"):
    """An example as it is stored."""
    return ensure_prepared(name, str(directory / "data"), None).as_data_source(split=split)[0]


def _sorted(source):
    return sorted((source[index] for index in range(len(source))), key=lambda record: record.name)


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """Opens the miniature of CUB or NABirds: its directory and both splits, prepared once."""
    with pytest.MonkeyPatch.context() as patch:
        found = {}
        for name in ("cub", "nabirds"):
            directory = tmp_path_factory.mktemp(name)
            miniatures.MAKE[name](directory)
            miniatures.expect(patch, name)
            leftover = directory / "data" / name / "incomplete.ABC123_1.0.0"  # of a killed preparation
            leftover.mkdir(parents=True)
            found[name] = directory, *_open(directory, name)
            assert not leftover.exists()
    return found


def test_training_on_a_miniature(birds, tmp_path, tiny_config):
    section = _section(birds["cub"][0], "cub")
    tiny_config.data.update(source="cub", data_dir=section.data_dir, manual_dir=section.manual_dir)
    tiny_config.train.epochs, tiny_config.optim.warmup_epochs = 0.25, 0.0
    tiny_config.eval.protocols = ("retrieval", "pointing")
    train_and_evaluate(tiny_config, str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1]
    metrics = json.loads((tmp_path / "eval" / "1" / "metrics.json").read_text())
    assert "12 test queries, 36 train images" in metrics["protocol"]["rank1"]
    assert "pointing_accuracy" in metrics["metrics"]


@pytest.mark.parametrize("name", ["cub", "nabirds"])
def test_bird_tables(name, birds):
    directory, train, test = birds[name]
    leaves = ("Common Eider (Adult male)", "St. Vincent Parrot")
    assert train.class_names == {"cub": miniatures.SPECIES, "nabirds": leaves}[name]
    assert (len(train), len(test)) == (36, 12)
    by_number = {int(record.name[-8:-4]): record for record in _sorted(train) + _sorted(test)}
    assert sorted(by_number) == list(range(1, 49))
    assert by_number[1].name == "0001/Some.Bird_0001.jpg"
    assert all(record.label == number % 2 for number, record in by_number.items())
    np.testing.assert_allclose(decode_record(by_number[1])[0, 0], (44, 0, 255), atol=4)
    assert decode_record(by_number[2]).shape == (40, 60, 3)  # a grey one
    boxes = by_number[1].part_boxes
    # the one visible part: (y, x) = (10, 15) of 40 x 60, a square of 15 % of the longer side of the box, 30 px
    np.testing.assert_allclose(boxes[1], [(10 - 2.25) / 40, (15 - 2.25) / 60, (10 + 2.25) / 40, (15 + 2.25) / 60], rtol=1e-5)
    assert np.all(np.delete(boxes, 1, axis=0) == 0)
    assert boxes.shape == ({"cub": 15, "nabirds": 11}[name], 4)
    row = _row(directory, name)
    np.testing.assert_allclose(row["box"], [4 / 40, 6 / 60, 24 / 40, 36 / 60], rtol=1e-6)
    np.testing.assert_allclose(row["part_locations"][1], [10 / 40, 15 / 60, 1])


@pytest.mark.parametrize("combined", [False, True])
def test_cars_in_both_layouts(combined, tmp_path, monkeypatch):
    miniatures.make_cars(tmp_path, 6, 4, combined=combined)
    miniatures.expect(monkeypatch, "cars", 6, 4)
    train, test = _open(tmp_path, "cars")
    assert train.class_names == miniatures.MODELS
    assert (len(train), len(test)) == (6, 4)
    first = _sorted(train)[0]
    assert (first.name, first.label) == ("car_ims/000001.jpg" if combined else "cars_train/00001.jpg", 0)
    np.testing.assert_allclose(decode_record(first)[0, 0], (40, 0, 255), atol=4)
    assert [record.label for record in _sorted(test)] == [0, 1, 0, 1]
    np.testing.assert_allclose(_row(tmp_path, "cars")["box"], [4 / 40, 6 / 60, 24 / 40, 36 / 60], rtol=1e-6)


@pytest.mark.parametrize("name", ["aircraft", "aircraft/family", "aircraft/manufacturer"])
def test_aircraft_levels_and_banner(name, tmp_path, monkeypatch):
    miniatures.make_aircraft(tmp_path, 6, 3)
    miniatures.expect(monkeypatch, name, 6, 3)
    train, _ = _open(tmp_path, name)
    level = DATASETS[name].level
    assert (tmp_path / "data" / "aircraft" / level / "1.0.0").is_dir()
    names = miniatures.LEVELS[aircraft.LEVELS[level][0]]
    assert train.class_names == names
    records = _sorted(train)
    assert [record.label for record in records] == [number % len(names) for number in range(6)]
    assert records[0].name == "0000000.jpg"
    assert decode_record(records[0]).shape == (40, 60, 3)
    with pytest.raises(BadImage, match=r"0000000\.jpg: .* are all in the banner of 60"):
        decode_record(records[0]._replace(banner_px=60))
    box = _row(tmp_path, name)["box"]
    np.testing.assert_allclose(box, [4 / 40, 6 / 60, 24 / 40, 36 / 60], rtol=1e-6)  # of the 40 rows above the banner


def test_official_counts():
    assert (*DATASETS, "folder") == SOURCES
    found = {
        name: (dataset.counts["train"], dataset.counts["test"], dataset.classes)
        for name, dataset in DATASETS.items()
        if dataset.layouts
    }
    assert found == {
        "cub": (5994, 5794, 200),
        "cars": (8144, 8041, 196),
        "aircraft": (6667, 3333, 100),
        "aircraft/family": (6667, 3333, 70),
        "aircraft/manufacturer": (6667, 3333, 30),
        "nabirds": (23_929, 24_633, 555),
    }


def test_a_dataset_is_prepared_once(tmp_path, monkeypatch):
    miniatures.make_cub(tmp_path, 4, 2)
    miniatures.expect(monkeypatch, "cub", 4, 2)
    with ThreadPoolExecutor(3) as pool:  # a lock holds between file handles, of one process or of several
        opened = list(pool.map(lambda _: _open(tmp_path, "cub"), range(3)))
    assert [tuple(map(len, splits)) for splits in opened] == [(4, 2)] * 3
    assert [entry.name for entry in (tmp_path / "data" / "cub").iterdir() if entry.is_dir()] == ["1.0.0"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cub", r"lacks CUB_200_2011\.tgz from https://data\.caltech\.edu.*cmd_jax\.prepare cub downloads it.*manual_dir=DIR"),
        ("cars", r"lacks cars_train\.tgz and .*annos_withlabels\.mat from .*dead.*or instead car_ims\.tgz and cars_annos"),
        ("aircraft", r"lacks fgvc-aircraft-2013b\.tar\.gz from https://www\.robots.*prepare aircraft downloads it"),
        ("nabirds", r"lacks nabirds\.tar\.gz from https://dl\.allaboutbirds\.org.*Remedy: put it there unchanged"),
    ],
)
def test_missing_archives_are_named(name, message, tmp_path):
    with pytest.raises(DatasetError, match=message):
        _open(tmp_path, name)


def test_damaged_archives_leave_nothing(tmp_path, monkeypatch):
    miniatures.expect(monkeypatch, "cub", 4, 2)
    path, root = tmp_path / miniatures.CUB_ARCHIVE, "CUB_200_2011"
    files = miniatures.make_cub(tmp_path, 4, 2)
    first = f"{root}/images/0001/Some.Bird_0001.jpg"
    without = lambda name: {key: value for key, value in files.items() if key != name}
    one_class = files[f"{root}/image_class_labels.txt"].replace(" 2\n", " 1\n")
    for changed, message in (
        (without(f"{root}/parts/part_locs.txt"), "lacks CUB_200_2011/parts/part_locs.txt"),
        (without(first), f"lacks 1 images, first {first}"),
        (files | {f"{root}/images.txt": "1 a.jpg\n"}, "tables do not fit together"),
        (files | {f"{root}/image_class_labels.txt": one_class}, "lists 1 classes, CUB-200-2011 has 2"),
        (files | {first: b"no image"}, r"0001/Some.Bird_0001\.jpg: not a readable image"),
    ):
        miniatures.pack(path, changed)
        with pytest.raises((DatasetError, BadImage), match=message):
            _open(tmp_path, "cub")
        assert not list((tmp_path / "data").rglob("*.array_record*"))
    miniatures.make_cub(tmp_path, 3, 2)
    with pytest.raises(DatasetError, match="lists 3 train images, CUB-200-2011 has 4"):
        _open(tmp_path, "cub")
    for content in (b"<html>404</html>", path.read_bytes()[:-3000]):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match="cannot be read"):
            _open(tmp_path, "cub")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_annotations_follow_exif_rotation(orientation):
    pixels = np.zeros((40, 64, 3), np.uint8)
    pixels[8:16, 24:40] = 255
    out, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(out, "jpeg", quality=100, exif=exif)
    box, parts = np.array([8.0, 24.0, 16.0, 40.0]), np.array([[12.0, 32.0, 1.0], [0.0, 0.0, 0.0]])
    name, content = example(out.getvalue(), Annotation(0, "train", box, parts), "a.jpg")
    shown = decode_record(Record(out.getvalue(), 0, name, content["part_boxes"]))
    rows, columns = np.nonzero(shown[..., 0] > 127)
    found = np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1])
    scale = np.tile(shown.shape[:2], 2)
    np.testing.assert_allclose(content["box"] * scale, found, atol=1e-4)
    np.testing.assert_allclose(content["part_locations"][0, :2] * scale[:2], (found[:2] + found[2:]) / 2, atol=1e-4)
    centre = content["part_boxes"][0].reshape(2, 2).mean(0)
    np.testing.assert_allclose(centre, content["part_locations"][0, :2], atol=1e-5)
    assert np.all(content["part_boxes"][1] == 0)


def test_files_that_are_no_annotations(tmp_path, monkeypatch):
    miniatures.make_cars(tmp_path, 4, 2)
    miniatures.expect(monkeypatch, "cars", 4, 2)
    labels = tmp_path / cars.TEST_LABELS.name
    devkit = archives.read_all(str(tmp_path / cars.DEVKIT.name), {"devkit/cars_test_annos.mat"})
    for content, message in (
        (*devkit.values(), r"annotations have no field 'class', only .*fname; get the file with labels"),
        (b"<html>404</html>", r"annotations cannot be read from a \.mat file"),
    ):
        labels.write_bytes(content)
        with pytest.raises(DatasetError, match=message):
            _open(tmp_path, "cars")


def test_archives_are_compared_with_their_digests(tmp_path):
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
