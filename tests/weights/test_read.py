"""Reading files, directories and the hub, pickles as far as they go without PyTorch, and the files beside them."""

import importlib.util
import json
import sys
import types

import ml_dtypes
import numpy as np
import pytest

from cmd_jax.errors import WeightsError
from cmd_jax.weights import pickled_child
from cmd_jax.weights.files import read_safetensors, write_safetensors
from cmd_jax.weights.read import read_source, recognise_source
from tests.weights.checkpoints import dino_vit, open_clip, same

VIT = {"model_type": "vit", "num_attention_heads": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}


def test_floats_become_float32_and_integers_stay(tmp_path):
    path = str(tmp_path / "a.safetensors")
    values = np.array([1.5, -2.0, 0.25])
    types_ = {"b16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32, "f64": np.float64, "i64": np.int64}
    write_safetensors(path, {name: values.astype(dtype) for name, dtype in types_.items()})
    for name, array in read_safetensors(path).items():
        assert array.dtype == (np.int64 if name == "i64" else np.float32), name
        np.testing.assert_array_equal(array, values.astype(types_[name]).astype(np.float32))


def test_transposed_arrays_are_written_contiguous(tmp_path):
    path = str(tmp_path / "a.safetensors")
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_safetensors(path, {"a": array.T})
    np.testing.assert_array_equal(read_safetensors(path)["a"], array.T)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.safetensors", "does not exist; give a file, a directory or hf:OWNER/NAME"),
        ("damaged.safetensors", "no whole .safetensors file"),
        ("weights.npz", "of no known kind; give a .safetensors"),
        (".", "has no model.safetensors"),
    ],
)
def test_unreadable_sources(tmp_path, name, message):
    (tmp_path / "damaged.safetensors").write_bytes(b"\x20\0\0\0\0\0\0\0{")
    (tmp_path / "weights.npz").write_bytes(b"PK")
    with pytest.raises(WeightsError, match=message):
        read_source(str(tmp_path / name), "teacher")


def test_pickles_need_torch(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    path.write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match="needs PyTorch: pip install torch"):
        read_source(str(path), "teacher")


def test_the_child_process_gives_the_error(tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text("import sys\nprint('noise', file=sys.stderr)\nsys.exit('it is of ' + sys.argv[2])\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(pickled_child, "__file__", str(child))
    (tmp_path / "a.pth").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"a\.pth was not read: it is of student"):
        read_source(str(tmp_path / "a.pth"), "student")


def test_one_network_of_a_checkpoint_is_selected():
    teacher, student, flat = {"a": 1}, {"a": 2}, {"a": 3}
    full = {"teacher": teacher, "student": student, "optimizer": {"state": {}}, "epoch": 3}
    assert pickled_child.select(full, "teacher") is teacher
    assert pickled_child.select(full, "student") is student
    assert pickled_child.select({"state_dict": flat}, "teacher") is flat
    assert pickled_child.select({"model": flat, "epoch": 1}, "student") is flat
    assert pickled_child.select(flat, "teacher") is flat
    with pytest.raises(ValueError, match=r"it has no student, but a teacher; set init\.network=teacher"):
        pickled_child.select({"teacher": teacher}, "student")
    with pytest.raises(ValueError, match="it holds a list, not names with arrays"):
        pickled_child.select([1], "teacher")


class EntryNotFound(OSError):
    """Of the hub: a repository without such a file."""


def _hub(monkeypatch, result):
    """Stands in for huggingface_hub; returns the list of its calls."""
    calls = []

    def download(repository, filename, revision=None):
        calls.append((repository, filename, revision))
        if filename != "model.safetensors":
            raise EntryNotFound(filename)
        if isinstance(result, Exception):
            raise result
        return result

    hub, errors = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.errors")
    hub.hf_hub_download = download
    errors.EntryNotFoundError = EntryNotFound
    errors.LocalEntryNotFoundError = type("LocalEntryNotFound", (EntryNotFound,), {})
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return calls


@pytest.mark.parametrize(("source", "revision"), [("hf:owner/name", None), ("hf:owner/name@v1", "v1")])
def test_a_model_on_the_hub(tmp_path, monkeypatch, source, revision):
    path = str(tmp_path / "blob.safetensors")
    write_safetensors(path, dino_vit())
    calls = _hub(monkeypatch, path)
    read = read_source(source, "teacher")
    same(read.named.arrays, dino_vit())
    files = ("model.safetensors", "config.json", "preprocessor_config.json", "open_clip_config.json")
    assert calls == [("owner/name", file, revision) for file in files]


@pytest.mark.parametrize("failure", [ConnectionError("offline mode\nlong story"), ValueError("Repo id must be OWNER/NAME")])
def test_the_hub_out_of_reach(monkeypatch, failure):
    _hub(monkeypatch, failure)
    first = str(failure).splitlines()[0]
    with pytest.raises(WeightsError, match=rf"hf:owner/name cannot be downloaded \({first}\); check the name"):
        read_source("hf:owner/name", "teacher")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match="needs huggingface_hub: pip install huggingface-hub"):
        read_source("hf:owner/name", "teacher")


def test_the_files_beside_count_for_known_names_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(VIT))
    for name in ("model.safetensors", "other.safetensors"):
        write_safetensors(str(tmp_path / name), dino_vit())
    for source in (tmp_path, tmp_path / "model.safetensors"):
        read = read_source(str(source), "teacher")
        same(read.named.arrays, dino_vit())
        assert read.recognised == recognise_source(str(source), "teacher")
        assert (read.recognised.keys["model.num_heads"], read.recognised.keys["model.layer_norm_eps"]) == (2, 1e-12)
    other = recognise_source(str(tmp_path / "other.safetensors"), "teacher")
    assert "model.num_heads" not in other.keys
    assert other.keys["model.layer_norm_eps"] == 1e-6


@pytest.mark.parametrize(
    "text", ["[1]", "{", '{"vision_config": 3}', '{"layer_norm_eps": "small"}', '{"pretrained_cfg": {"input_size": 1}}']
)
def test_damaged_files_beside(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    write_safetensors(str(tmp_path / "model.safetensors"), dino_vit())
    with pytest.raises(WeightsError, match=r"holds a list, not a JSON object|cannot be read|are of no known form"):
        recognise_source(str(tmp_path), "teacher")


def _in_parts(folder, arrays, dtype=np.float32):
    names = sorted(arrays)
    parts = {"a-1.safetensors": names[::2], "a-2.safetensors": names[1::2]}
    for part, held in parts.items():
        write_safetensors(str(folder / part), {name: arrays[name].astype(dtype) for name in held})
    index = {"metadata": {}, "weight_map": {name: part for part, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_network_in_several_files(tmp_path, dtype):
    _in_parts(tmp_path, dino_vit(), dtype)
    (tmp_path / "config.json").write_text(json.dumps(VIT))
    for source in (tmp_path, tmp_path / "model.safetensors.index.json"):
        read = read_source(str(source), "teacher")
        same(read.named.arrays, {name: array.astype(dtype).astype(np.float32) for name, array in dino_vit().items()})
        assert read.recognised.keys["model.num_heads"] == 2


@pytest.mark.parametrize("part", ["../a-1.safetensors", "/etc/a.safetensors", "a.bin", "..", "", "a\\b.safetensors"])
def test_an_index_names_files_beside_it(tmp_path, part):
    index = _in_parts(tmp_path, dino_vit())
    index["weight_map"]["norm.weight"] = part
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"index\.json names .*; a weight_map of \.safetensors beside it is read"):
        read_source(str(tmp_path), "teacher")


def test_open_clip_in_a_directory(tmp_path):
    arrays = {f"visual.{name}": array for name, array in open_clip().items()}
    write_safetensors(str(tmp_path / "open_clip_model.safetensors"), arrays)
    model = {"quick_gelu": True, "vision_cfg": {"image_size": 32, "layers": 2, "width": 8, "patch_size": 8, "head_width": 4}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    read = read_source(str(tmp_path), "teacher")
    same(read.named.arrays, open_clip())
    assert (read.recognised.keys["model.num_heads"], read.recognised.keys["model.activation"]) == (2, "quick_gelu")
