"""Reading files, directories and the hub; pickled checkpoints as far as they go without PyTorch."""

import importlib.util
import sys
import types

import ml_dtypes
import numpy as np
import pytest

from cmd_jax.errors import WeightsError
from cmd_jax.weights import pickled_child
from cmd_jax.weights.files import read_safetensors, write_safetensors
from cmd_jax.weights.pickled_child import select
from cmd_jax.weights.read import Facts, read_source
from tests.weights.checkpoints import dino_vit


def _same(a, b):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_floats_become_float32_and_integers_stay(tmp_path):
    path = str(tmp_path / "a.safetensors")
    values = np.array([1.5, -2.0, 0.25])
    types_ = {"b16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32, "f64": np.float64, "i64": np.int64}
    write_safetensors(path, {name: values.astype(dtype) for name, dtype in types_.items()})
    for name, array in read_safetensors(path).items():
        assert array.dtype == (np.int64 if name == "i64" else np.float32), name
        np.testing.assert_array_equal(array, values.astype(types_[name]).astype(np.float32))


def test_transposed_arrays_are_written_as_they_look(tmp_path):
    path = str(tmp_path / "a.safetensors")
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_safetensors(path, {"a": array.T})
    np.testing.assert_array_equal(read_safetensors(path)["a"], array.T)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_and_a_directory(tmp_path):
    arrays = dino_vit()
    write_safetensors(str(tmp_path / "model.safetensors"), arrays)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        _same(read_source(str(source), "teacher").arrays, arrays)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.safetensors", "does not exist; give a file, a directory or hf:OWNER/NAME"),
        ("damaged.safetensors", "no whole .safetensors file"),
        ("weights.npz", "of no known kind; give a .safetensors"),
        (".", "has no model.safetensors"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, message):
    (tmp_path / "damaged.safetensors").write_bytes(b"\x20\0\0\0\0\0\0\0{")
    (tmp_path / "weights.npz").write_bytes(b"PK")
    with pytest.raises(WeightsError, match=message):
        read_source(str(tmp_path / name), "teacher")


def test_a_pickled_checkpoint_needs_torch(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    path.write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match="needs PyTorch: pip install torch"):
        read_source(str(path), "teacher")


def test_the_last_word_of_the_child_process_is_the_error(tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text("import sys\nprint('noise', file=sys.stderr)\nsys.exit('it is of ' + sys.argv[2])\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(pickled_child, "__file__", str(child))
    (tmp_path / "a.pth").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"a\.pth was not read: it is of student"):
        read_source(str(tmp_path / "a.pth"), "student")


def test_the_network_of_a_checkpoint_is_found():
    teacher, student, flat = {"a": 1}, {"a": 2}, {"a": 3}
    full = {"teacher": teacher, "student": student, "optimizer": {"state": {}}, "epoch": 3}
    assert select(full, "teacher") is teacher
    assert select(full, "student") is student
    assert select({"state_dict": flat}, "teacher") is flat
    assert select({"model": flat, "epoch": 1}, "student") is flat
    assert select(flat, "teacher") is flat
    with pytest.raises(ValueError, match=r"it has no student, but a teacher; set init\.network=teacher"):
        select({"teacher": teacher}, "student")
    with pytest.raises(ValueError, match="it holds a list, not names with arrays"):
        select([1], "teacher")


class EntryNotFound(OSError):
    """Of the hub: a repository without such a file."""


class _Hub(types.ModuleType):
    """Stands in for the download alone."""

    def __init__(self, result):
        super().__init__("huggingface_hub")
        self.calls, self.result = [], result

    def hf_hub_download(self, repository, filename, revision=None):
        self.calls.append((repository, filename, revision))
        if filename != "model.safetensors":
            raise EntryNotFound(filename)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def _install(monkeypatch, hub):
    errors = types.ModuleType("huggingface_hub.errors")
    errors.EntryNotFoundError = EntryNotFound
    errors.LocalEntryNotFoundError = type("LocalEntryNotFound", (EntryNotFound,), {})
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)


@pytest.mark.parametrize(("source", "revision"), [("hf:owner/name", None), ("hf:owner/name@v1", "v1")])
def test_the_hub(tmp_path, monkeypatch, source, revision):
    path = str(tmp_path / "blob.safetensors")
    write_safetensors(path, dino_vit())
    hub = _Hub(path)
    _install(monkeypatch, hub)
    read = read_source(source, "teacher")
    _same(read.arrays, dino_vit())
    assert read.facts == Facts()
    files = ("model.safetensors", "config.json", "preprocessor_config.json")
    assert hub.calls == [("owner/name", file, revision) for file in files]


@pytest.mark.parametrize("failure", [ConnectionError("offline mode\nlong story"), ValueError("Repo id must be OWNER/NAME")])
def test_the_hub_out_of_reach(monkeypatch, failure):
    _install(monkeypatch, _Hub(failure))
    first = str(failure).splitlines()[0]
    with pytest.raises(WeightsError, match=rf"hf:owner/name cannot be downloaded \({first}\); check the name"):
        read_source("hf:owner/name", "teacher")


def test_the_hub_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match="needs huggingface_hub: pip install huggingface-hub"):
        read_source("hf:owner/name", "teacher")
