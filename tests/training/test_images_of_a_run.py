"""A run knows its images: others are refused, and the same ones are found wherever they were moved."""

import json
import os
import shutil

import pytest

from cmd_jax import config as config_lib
from cmd_jax.errors import ConfigError, InUse
from cmd_jax.evaluation.restore import evaluate_run
from cmd_jax.report.page import write_report
from cmd_jax.train_and_evaluate import train_and_evaluate
from cmd_jax.training.lock import hold
from cmd_jax.training.run import Run

STEPS = 6


@pytest.fixture
def photos(photo_folder, tmp_path):
    return shutil.copytree(photo_folder, tmp_path / "photos")


@pytest.fixture
def config(tiny_config, photos):
    tiny_config.data.source, tiny_config.data.folder = "folder", str(photos)
    return tiny_config


@pytest.fixture
def workdir(finished, tmp_path):
    """A finished run on images that are gone, in a directory that was moved."""
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    stored = json.loads((workdir / "config.json").read_text())
    stored["data"]["folder"] = str(tmp_path / "gone")
    (workdir / "config.json").write_text(json.dumps(stored))
    return workdir


@pytest.fixture(autouse=True)
def no_step(monkeypatch):
    monkeypatch.setattr(Run, "compile", lambda _: pytest.fail("a finished run trained"))


def _written(workdir):
    return {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}


def test_moved_images_are_recognised(workdir, config, photos, monkeypatch, capsys):
    with pytest.raises(ConfigError, match=r"data\.folder in .*config\.json is '.*gone', but there .*--folder=DIR"):
        evaluate_run(str(workdir), None)
    monkeypatch.chdir(photos.parent)
    shutil.rmtree(workdir / "report")
    evaluate_run("run", None, folder="photos", write_report=write_report)
    assert (workdir / "report" / "index.html").exists()
    assert os.listdir(workdir / "eval" / str(STEPS)) == ["metrics.json"]
    assert "start" in capsys.readouterr().out
    config.data.folder = "photos"
    train_and_evaluate(config, "run")
    assert config_lib.load("run/config.json").data.folder == str(photos)
    monkeypatch.chdir("/")
    evaluate_run(str(workdir), None)


def test_other_images_are_refused(workdir, config, photos):
    os.remove(photos / "train" / "a class" / "0.png")
    (photos / "test" / "b.class" / "0.png").write_bytes((photos / "test" / "b.class" / "1.png").read_bytes())
    before = _written(workdir)
    message = (
        r"run was started with other images: the training images: 1 removed \(train/a class/0\.png\); the test images: 1 of "
        r"another size \(test/b\.class/0\.png\); .* another --workdir and --config\.init\.weights=.*run"
    )
    with pytest.raises(ConfigError, match=message):
        train_and_evaluate(config, str(workdir))
    config_lib.save(config_lib.resolve(config, 24), str(workdir / "config.json"))
    before[workdir / "config.json"] = (workdir / "config.json").stat().st_mtime_ns
    with pytest.raises(ConfigError, match=r"trained and measured with other images: .* pass --folder=DIR to keep the numbers"):
        evaluate_run(str(workdir), None)
    assert _written(workdir) == before
    evaluate_run(str(workdir), None, folder=str(photos))
    (other,) = (path for path in _written(workdir) if path not in before)
    assert other.parent.name.startswith("on_")


def test_runs_of_earlier_versions_record_their_images(workdir, config, photos, monkeypatch):
    shutil.rmtree(workdir / "data")
    os.remove(workdir / "data.json")
    with pytest.raises(ConfigError, match=r"data\.folder is '.*gone' there and '.*photos' here"):
        train_and_evaluate(config, str(workdir))  # nothing says that the images are the same
    stored = config_lib.load(str(workdir / "config.json"))
    with stored.unlocked():
        stored.data.folder = "photos"
    config_lib.save(stored, str(workdir / "config.json"))
    monkeypatch.chdir("/")
    with pytest.raises(ConfigError, match=r"is 'photos', but there is no such directory in / \(earlier versions stored rel"):
        evaluate_run(str(workdir), None)
    monkeypatch.chdir(photos.parent)
    train_and_evaluate(config, str(workdir))
    assert set(json.loads((workdir / "data.json").read_text())) == {"train", "eval_test"}


def test_run_evaluated_at_its_start_has_begun(workdir, config):
    shutil.rmtree(workdir / "checkpoints")
    config.seed = 1
    with pytest.raises(ConfigError, match="seed is 0 there and 1 here"):
        train_and_evaluate(config, str(workdir))


def test_workdir_in_use_is_left_alone(workdir, config):
    with hold(str(workdir)):
        before = _written(workdir)
        with pytest.raises(InUse, match="run is in use: process"):
            train_and_evaluate(config, str(workdir))
        assert _written(workdir) == before
