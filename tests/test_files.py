"""Files of work directories, local and in a bucket; fsspec's memory stands in for the bucket."""

import json

import pytest

from cmd_jax import config as config_lib
from cmd_jax import files
from cmd_jax.training import metrics
from tests.buckets import bucket


@pytest.fixture(params=["disk", "bucket"])
def workdir(request, tmp_path):
    if request.param == "disk":
        yield str(tmp_path / "run")
        return
    with bucket() as address:
        yield f"{address}/run"


def test_files(workdir):
    path = f"{workdir}/eval/3/metrics.json"
    assert not files.exists(path)
    files.make_directory(f"{workdir}/eval/3")
    files.write(path, "Wörter\n")
    assert files.exists(path)
    assert files.exists(f"{workdir}/eval")
    assert files.read(path) == "Wörter\n"
    files.write(path, b"2")
    assert files.read(path) == "2"
    files.remove(path)
    assert not files.exists(path)
    files.create(path, "first")
    with pytest.raises(FileExistsError):
        files.create(path, "second")
    assert files.read(path) == "first"
    assert files.names(f"{workdir}/eval/3") == ["metrics.json"]


def test_configuration(workdir, tiny_config):
    files.make_directory(workdir)
    config_lib.save(tiny_config, f"{workdir}/config.json")
    assert config_lib.load(f"{workdir}/config.json").to_dict() == tiny_config.to_dict()


def test_metrics_continue_after_a_checkpoint(workdir, monkeypatch):
    """What an interrupted run wrote after its checkpoint is dropped; in a bucket the file is whole after every upload."""
    monkeypatch.setattr(metrics, "EventsWriter", Events)
    files.make_directory(workdir)
    for first_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = metrics.MetricsWriter(workdir, first_step)
        for step in steps:
            writer.write(step, {"loss": step + first_step / 10})
        writer.close()
    lines = [json.loads(line) for line in files.read(f"{workdir}/metrics.jsonl").splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 3.2), (4, 4.2)]


def test_bucket_metrics_are_uploaded_now_and_then(workdir, monkeypatch):
    monkeypatch.setattr(metrics, "EventsWriter", Events)
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    files.make_directory(workdir)
    writer = metrics.MetricsWriter(workdir, 0)
    seen = []
    for step in range(1, 4):
        now[0] += 40
        writer.write(step, {"loss": 1.0})
        seen.append(files.read(f"{workdir}/metrics.jsonl").count("\n"))
    writer.close()
    assert seen == ([0, 2, 2] if files.is_remote(workdir) else [1, 2, 3])
    assert files.read(f"{workdir}/metrics.jsonl").count("\n") == 3


class Events:
    """The writer of TensorBoard's events, which has a client of its own for buckets."""

    def __init__(self, file_prefix):
        pass

    def write_event(self, event):
        pass

    def flush(self):
        pass

    def close(self):
        pass


@pytest.mark.parametrize(
    ("path", "words"),
    [("gs://bucket/run", ("gcsfs", "pip install '.[gcs]'")), ("ftp://host/run", ("gs://BUCKET/DIR",)), ("runs/demo", None)],
)
def test_refusal(path, words, monkeypatch):
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    refusal = files.refusal(path)
    assert (refusal is None) == (words is None)
    assert all(word in refusal for word in words or ())


def test_installed_backend_is_accepted(monkeypatch):
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: name)
    assert files.refusal("gs://bucket/run") is None
