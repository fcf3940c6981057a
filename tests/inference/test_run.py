"""A folder into one file: the API's features, bad images, interruption, and refusal of what does not belong together."""

import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

import cmd_jax
from cmd_jax.errors import ConfigError, DatasetError
from cmd_jax.inference import embed_folder as run
from cmd_jax.inference import store
from cmd_jax.inference.embed_folder import Summary, embed_folder
from cmd_jax.inference.load import read_trained

BATCH = 4


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(run, "PART_IMAGES", 2 * BATCH)  # five parts of the 36 images


@pytest.fixture
def folder(photo_folder, tmp_path):
    return shutil.copytree(photo_folder, tmp_path / "photos")


def _read(path, columns):
    meta = store.read_meta(path)
    pieces = list(store.rows(path, meta, columns))
    names = [name for piece in pieces for name in piece[0]]
    return meta, names, {column: np.concatenate([piece[1][column] for piece in pieces]) for column in columns}


@pytest.mark.parametrize("suffix", store.SUFFIXES)
def test_columns_equal_the_api(suffix, trained, finished, photo_folder, tmp_path):
    out = str(tmp_path / "step=3" / f"features{suffix}")
    summary = embed_folder(trained, str(photo_folder), out, BATCH, patches=True)
    assert summary == Summary(images=36, bad=0, computed=36, bad_list=None)
    assert os.listdir(tmp_path / "step=3") == [f"features{suffix}"]
    meta, names, columns = _read(out, ["features", "patch_tokens", "mil_weights"])
    assert names == sorted(str(path.relative_to(photo_folder)) for path in photo_folder.rglob("*.png"))
    assert (meta.step, meta.features, meta.crop_px, meta.grid, meta.images) == (6, "mil", 16, 2, 36)
    assert (meta.checkpoint, meta.fingerprint, meta.version) == (str(finished[0]), trained.fingerprint, cmd_jax.__version__)
    model = cmd_jax.load(finished[0], batch_size=BATCH)
    paths = [photo_folder / name for name in names]
    np.testing.assert_allclose(columns["features"], model.embed(paths), atol=2e-6)
    np.testing.assert_allclose(columns["mil_weights"].reshape(36, 2, 2), model.mil_weights(paths), atol=1e-6)
    tokens = model.patch_tokens(paths)
    assert columns["patch_tokens"].dtype == np.float16
    np.testing.assert_allclose(columns["patch_tokens"].reshape(tokens.shape), tokens, rtol=2e-3, atol=2e-3)


def test_other_readers_find_plain_columns(trained, photo_folder, tmp_path):
    embed_folder(trained, str(photo_folder), str(tmp_path / "a.parquet"), BATCH)
    embed_folder(trained, str(photo_folder), str(tmp_path / "a.npz"), BATCH)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["path", "features"]
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert sorted(arrays.files) == ["features", "metadata", "path"]
        np.testing.assert_array_equal(np.stack(table["features"].to_numpy()), arrays["features"])
        assert table["path"].to_pylist() == arrays["path"].tolist()


def test_bad_images_are_left_out_listed_and_counted(trained, folder, tmp_path):
    out = str(tmp_path / "a.parquet")
    (folder / "train" / "a class" / "3.png").write_bytes(b"no picture")
    (folder / "zzz\x1b.png").symlink_to(tmp_path / "nowhere")
    (folder / os.fsdecode(b"b\xff.png")).write_bytes((folder / "test" / "a class" / "0.png").read_bytes())
    summary = embed_folder(trained, str(folder), out, BATCH)
    assert summary == Summary(images=36, bad=2, computed=38, bad_list=f"{out}.bad.txt")
    lines = (tmp_path / "a.parquet.bad.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["train/a class/3.png", "zzz\\x1b.png"]
    assert "not a readable image" in lines[0]
    names = _read(out, ["features"])[1]
    assert names[0] == "b\\udcff.png"
    assert "train/a class/3.png" not in names
    assert embed_folder(trained, str(folder), out, BATCH) == Summary(36, 2, 0, f"{out}.bad.txt")


def test_mostly_bad_images_are_an_error(trained, tmp_path, photo_folder):
    folder, out = tmp_path / "photos", str(tmp_path / "a.npz")
    folder.mkdir()
    shutil.copy(photo_folder / "test" / "a class" / "0.png", folder / "good.png")
    (folder / "bad0.png").write_bytes(b"")
    assert embed_folder(trained, str(folder), out, BATCH).bad == 1  # half is not more than half
    (folder / "bad1.png").write_bytes(b"")
    other = str(tmp_path / "b.npz")
    with pytest.raises(DatasetError, match=r"2 of 3 images are bad, more than half; .*b\.npz\.bad\.txt lists them"):
        embed_folder(trained, str(folder), other, BATCH)
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "a.npz.bad.txt", "b.npz.bad.txt", "photos"]


@pytest.fixture
def interrupted(trained, folder, tmp_path, monkeypatch):
    """A job that Ctrl-C ended in its third part."""
    out = str(tmp_path / "a.parquet")
    crop = run.file_crop

    def stopping(path, config):
        if path.endswith("test/b.class/3.png"):
            raise KeyboardInterrupt
        return crop(path, config)

    with monkeypatch.context() as patch:
        patch.setattr(run, "file_crop", stopping)
        with pytest.raises(KeyboardInterrupt):
            embed_folder(trained, str(folder), out, BATCH)
    assert not os.path.exists(out)
    return out


def _same_bytes(path, other):
    with open(path, "rb") as a, open(other, "rb") as b:
        assert a.read() == b.read()


def test_interrupted_jobs_resume_bit_exactly(interrupted, trained, folder, tmp_path):
    parts = sorted(name for name in os.listdir(f"{interrupted}.partial") if name.endswith(".parquet"))
    assert parts == ["000000.parquet"]
    cut = tmp_path / "a.parquet.partial" / "000000.parquet"
    whole = str(tmp_path / "whole.parquet")
    embed_folder(trained, str(folder), whole, BATCH)
    content = cut.read_bytes()
    assert embed_folder(trained, str(folder), interrupted, BATCH).computed == 36 - 8
    _same_bytes(whole, interrupted)
    os.remove(interrupted)
    cut.parent.mkdir()
    cut.write_bytes(content[:-9])  # what a crash of the machine may leave
    (tmp_path / "a.parquet.partial" / "000000.parquet.bad").write_text("")
    assert embed_folder(trained, str(folder), interrupted, BATCH).computed == 36
    _same_bytes(whole, interrupted)


def test_parts_of_another_job_are_refused(interrupted, trained, finished, folder):
    remedy = r"remove it to start over, or go on as it was begun"
    other = read_trained(str(finished[0]), step=3)
    with pytest.raises(ConfigError, match=rf"a\.parquet\.partial holds parts .* another checkpoint; {remedy}"):
        embed_folder(other, str(folder), interrupted, BATCH)
    with pytest.raises(ConfigError, match=rf"another options; {remedy}"):
        embed_folder(trained, str(folder), interrupted, BATCH, patches=True)
    (folder / "new.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=rf"another images; {remedy}"):
        embed_folder(trained, str(folder), interrupted, BATCH)
    with open(f"{interrupted}.partial/job.json", "w") as file:
        file.write("{}")
    with pytest.raises(DatasetError, match=r"job\.json is damaged; remove .* to start over"):
        embed_folder(trained, str(folder), interrupted, BATCH)


def test_complete_files_are_kept(trained, finished, photo_folder, tmp_path):
    out = str(tmp_path / "a.npz")
    embed_folder(trained, str(photo_folder), out, BATCH)
    before = (tmp_path / "a.npz").stat().st_mtime_ns
    assert embed_folder(trained, str(photo_folder), out, BATCH) == Summary(36, 0, 0, None)
    with pytest.raises(ConfigError, match="is there already, of another images or options"):
        embed_folder(trained, str(photo_folder / "test"), out, BATCH)
    with pytest.raises(ConfigError, match="is there already, of another checkpoint; choose another path, or remove it"):
        embed_folder(read_trained(str(finished[0]), step=3), str(photo_folder), out, BATCH)
    assert (tmp_path / "a.npz").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("images", "out", "message"),
    [
        ("photos", "a.csv", r"a\.csv must end in \.parquet or \.npz"),
        ("photos", "gs://bucket/a.npz", "must be a local path"),
        ("photos", "directory.npz", "is a directory; name a file in it"),
        ("none", "a.npz", "none is not a directory"),
        ("directory.npz", "a.npz", r"holds no images; put files \(\.jpg"),
    ],
)
def test_mistakes_raise_before_any_work(images, out, message, trained, photo_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(photo_folder)
    (tmp_path / "directory.npz").mkdir()
    with pytest.raises(ConfigError, match=message):
        embed_folder(trained, images, out, BATCH)
    assert sorted(os.listdir(tmp_path)) == ["directory.npz", "photos"]
