"""Search against plain loops over all images and patches."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import cmd_jax
from cmd_jax.errors import ConfigError, DatasetError
from cmd_jax.inference import commands, store
from cmd_jax.inference.embed_folder import embed_folder
from cmd_jax.inference.load import read_trained
from cmd_jax.inference.search import search
from cmd_jax.inference.sheet import write_sheet
from tests.inference.test_run import BATCH


@pytest.fixture(scope="module")
def gallery(trained, photo_folder, tmp_path_factory):
    """suffix -> (path, meta) of the training images at patch level."""
    directory, found = tmp_path_factory.mktemp("gallery"), {}
    for suffix in store.SUFFIXES:
        path = str(directory / f"features{suffix}")
        embed_folder(trained, str(photo_folder / "train"), path, BATCH, patches=True)
        found[suffix] = path, store.read_meta(path)
    return found


@pytest.fixture(scope="module")
def model(finished):
    return cmd_jax.load(finished[0], batch_size=BATCH)


@pytest.fixture
def query(photo_folder):
    return str(photo_folder / "test" / "b.class" / "2.png")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 7)


@pytest.mark.parametrize("suffix", store.SUFFIXES)
def test_images(suffix, gallery, trained, model, query, photo_folder):
    path, meta = gallery[suffix]
    found = search(trained, path, meta, query, top=6)
    paths = sorted((photo_folder / "train").rglob("*.png"))
    similarity = model.embed(paths) @ model.embed(query)[0]
    best = np.argsort(-similarity)[:6]
    assert [match.path for match in found.matches] == [str(paths[i].relative_to(photo_folder / "train")) for i in best]
    np.testing.assert_allclose([match.similarity for match in found.matches], similarity[best], atol=1e-5)
    assert found.patch is None
    assert len(search(trained, path, meta, query, top=1000).matches) == 24
    itself = search(trained, path, meta, str(paths[5]), top=1).matches[0]
    assert (itself.path, round(itself.similarity, 5)) == (str(paths[5].relative_to(photo_folder / "train")), 1)


@pytest.mark.parametrize("patch", [None, (1, 0)])
def test_patches(patch, gallery, trained, model, query, photo_folder):
    path, meta = gallery[".parquet"]
    found = search(trained, path, meta, query, top=5, patches=True, patch=patch)
    weights = model.mil_weights(query)[0]
    row, column = patch or max(np.ndindex(2, 2), key=lambda place: weights[place])
    assert found.patch == (row, column)
    token = model.patch_tokens(query)[0, row, column]
    cosine = lambda a, b: float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    expected = []
    for name in sorted((photo_folder / "train").rglob("*.png")):
        tokens = model.patch_tokens(name)[0]
        place = max(np.ndindex(2, 2), key=lambda place: cosine(tokens[place], token))
        expected.append((cosine(tokens[place], token), str(name.relative_to(photo_folder / "train")), place))
    expected.sort(key=lambda item: -item[0])
    assert [(match.path, match.patch) for match in found.matches] == [item[1:] for item in expected[:5]]
    np.testing.assert_allclose([match.similarity for match in found.matches], [item[0] for item in expected[:5]], atol=1e-3)


def test_what_cannot_be_compared_is_refused(gallery, trained, finished, query, photo_folder, tmp_path):
    path, meta = gallery[".npz"]
    other = read_trained(str(finished[0]), step=3)
    with pytest.raises(
        ConfigError, match=r"was made by another checkpoint \(.*, step 6, fingerprint \w{32}\) than .*; pass the one"
    ):
        search(other, path, meta, query)
    with pytest.raises(ConfigError, match="--patch=2,0 is outside the grid of 2 x 2 patches; count from 0"):
        search(trained, path, meta, query, patches=True, patch=(2, 0))
    plain = str(tmp_path / "plain.npz")
    embed_folder(trained, str(photo_folder / "test"), plain, BATCH)
    with pytest.raises(ConfigError, match="has no patch tokens; embed again with --patches"):
        search(trained, plain, store.read_meta(plain), query, patches=True)
    network = commands.Source(str(finished[0]), None, "cls", {})
    with pytest.raises(ConfigError, match=r"--features=cls, but .*plain\.npz holds mil; leave the flag out"):
        commands.find(network, plain, query, 3, False, None, None, None)
    with pytest.raises(ConfigError, match="--patch=1,x is no place; give ROW,COLUMN"):
        commands.find(commands.Source(str(finished[0]), None, None, {}), plain, query, 3, False, (1, "x"), None, None)
    without = trained._replace(params={"backbone": trained.params["backbone"]})
    with pytest.raises(ConfigError, match="has no MIL scorer that would choose a patch; name one: --patch=ROW,COLUMN"):
        search(without, path, meta, query, patches=True)


def test_the_lines_that_are_printed(gallery, exported, query, photo_folder, tmp_path):
    sheet = str(tmp_path / "new" / "sheet.png")
    arguments = (gallery[".parquet"][0], query, 3, True, (0, 1), sheet, str(photo_folder / "train"))
    lines = commands.find(
        commands.Source(str(exported), None, None, {}), *arguments
    )  # the file exported from the run may search too
    assert lines[0] == f"patch (0, 1) of {query}"
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "3"]
    assert all(line.endswith(".png") for line in lines[1:4])
    assert lines[4] == f"wrote {sheet}"
    with Image.open(sheet) as picture:
        assert picture.size[0] > 1000


def test_sheet_refuses_paths_outside_the_folder(gallery, trained, query, photo_folder, tmp_path):
    path, meta = gallery[".npz"]
    found = search(trained, path, meta, query, top=2)
    gone = shutil.copytree(photo_folder / "train", tmp_path / "photos")
    (gone / found.matches[0].path).unlink()
    sheet = str(tmp_path / "sheet.png")
    write_sheet(sheet, trained.config, str(gone), query, found)
    for outside in ("/etc/passwd", "../../etc/passwd", "a/../../b.png"):
        changed = found._replace(matches=[found.matches[0]._replace(path=outside)])
        with pytest.raises(ConfigError, match="is not below --images"):
            write_sheet(sheet, trained.config, str(gone), query, changed)
    with pytest.raises(ConfigError, match=r"sheet\.jpg must end in \.png"):
        write_sheet(str(tmp_path / "sheet.jpg"), trained.config, str(gone), query, found)
    with pytest.raises(ConfigError, match=r"sheet\.png lies in --images=.*photos and would be read as one of its images"):
        write_sheet(str(gone / "new" / "sheet.png"), trained.config, str(gone), query, found)


def _meta(**values):
    fields = ["0", "run", 1, "f", "j", "mil", 16, 2, {"features": 3}, 2]
    return store.Meta(*fields)._replace(**values)


def _write(place, meta, **arrays):
    text = json.dumps({"schema": store.SCHEMA, **meta._asdict()})
    usual = {"path": np.array(["a", "b"]), "features": np.eye(2, 3, dtype=np.float32)}
    np.savez(place, **({"metadata": np.array(text)} | usual | arrays))
    return place


@pytest.mark.parametrize(
    ("meta", "arrays", "message"),
    [
        ({}, {"features": np.array([[np.nan, 0, 0]] * 2, np.float32)}, "features has numbers that are not finite"),
        ({}, {"features": np.zeros((2, 4), np.float32)}, "its columns are"),
        ({}, {"features": np.zeros((2, 3), np.float64)}, "its columns are"),
        ({}, {"features": np.array([[{}] * 3] * 2, object)}, "its columns are|allow_pickle"),
        ({}, {"path": np.array([{}, {}], object)}, "allow_pickle=False"),
        ({}, {"path": np.array([1, 2])}, "its columns are"),
        ({}, {"other": np.zeros((2, 3), np.float32)}, "its columns are"),
        ({"images": 3}, {}, "its columns are"),
        ({"widths": {"features": 3, "other": 3}}, {}, "its metadata has columns"),
        ({"widths": {"features": -3}}, {}, "values of other types"),
        ({"grid": 0}, {}, "its metadata has columns"),
        ({"step": "six"}, {}, "values of other types"),
        ({"features": None}, {}, "values of other types"),
        ({"widths": {"features": 3, "mil_weights": 3}}, {"mil_weights": np.zeros((2, 3), np.float32)}, "no grid of 2 x 2"),
    ],
)
def test_a_file_that_lies_is_refused(meta, arrays, message, tmp_path):
    path = str(_write(tmp_path / "a.npz", _meta(**meta), **arrays))
    with pytest.raises(DatasetError, match=message) as error:
        list(store.rows(path, store.read_meta(path), ["features"]))
    assert path in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_was_packed_is_refused(tmp_path):
    """Its arrays could be any number of times larger than the file."""
    whole = _write(tmp_path / "a.npz", _meta())
    assert store.read_meta(str(whole)).images == 2
    with np.load(whole) as arrays:
        np.savez_compressed(tmp_path / "b.npz", **arrays)
    with pytest.raises(DatasetError, match="its arrays are compressed"):
        store.read_meta(str(tmp_path / "b.npz"))
    with pytest.raises(DatasetError, match=r"c\.npz does not exist; make it with"):
        store.read_meta(str(tmp_path / "c.npz"))
    with pytest.raises(DatasetError, match=r"c\.csv is no file of features"):
        store.read_meta(str(tmp_path / "c.csv"))
