"""Reading files, directories and the hub, pickles as far as they go without PyTorch, and the facts beside the weights."""

import importlib.util
import json
import sys
import types

import ml_dtypes
import numpy as np
import pytest

from cmd_jax import config as config_lib
from cmd_jax.errors import ConfigError, WeightsError
from cmd_jax.normalization import statistics_of
from cmd_jax.weights import pickled_child
from cmd_jax.weights.files import read_safetensors, write_safetensors
from cmd_jax.weights.read import Facts, follow, read_facts, read_source, read_source_facts
from tests.weights.checkpoints import dino_vit, same

HALF = "0.5,0.5,0.5/0.5,0.5,0.5"
VIT = {"model_type": "vit", "num_attention_heads": 12, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
MEAN_STD = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


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
    same(read.arrays, dino_vit())
    assert read.facts == Facts()
    files = ("model.safetensors", "config.json", "preprocessor_config.json")
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


def _facts(tmp_path, config=None, preprocessor=None):
    paths = []
    for name, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
        path = tmp_path / name
        if content is not None:
            path.write_text(json.dumps(content))
        paths.append(str(path) if content is not None else None)
    return read_facts(*paths)


def test_facts_of_transformers_and_timm(tmp_path):
    assert _facts(tmp_path) == Facts()
    assert _facts(tmp_path, VIT) == Facts(12, 1e-12, None)
    assert _facts(tmp_path, {"model_type": "swin", "num_heads": [3, 6], "layer_norm_eps": 1e-5}) == Facts(None, 1e-5, None)
    timm = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    assert _facts(tmp_path, timm | {"model_args": {"num_heads": 4}}) == Facts(4, None, HALF)


@pytest.mark.parametrize(
    "preprocessor",
    [
        MEAN_STD,
        MEAN_STD | {"rescale_factor": 0.00392156862745098},
        MEAN_STD | {"rescale_factor": 2 / 255},
        {"image_mean": [127.5, 100, 90], "image_std": [50, 60, 70], "do_rescale": False},
        {"do_normalize": False},
    ],
)
def test_normalization_equals_that_of_transformers(tmp_path, preprocessor):
    """The oracle: transformers rescales uint8 pixels, then subtracts the mean and divides."""
    pixels = np.arange(30, dtype=np.float64).reshape(10, 3) * 8
    expected = pixels * (preprocessor.get("rescale_factor", 1 / 255) if preprocessor.get("do_rescale", True) else 1)
    if preprocessor.get("do_normalize", True):
        expected = (expected - preprocessor["image_mean"]) / preprocessor["image_std"]
    mean, std = map(np.array, statistics_of(_facts(tmp_path, None, preprocessor).normalization))
    np.testing.assert_allclose((pixels / 255 - mean) / std, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "quick_gelu"}, "has hidden_act 'quick_gelu'; only 'gelu'"),
        ({"layer_norm_eps": "small"}, "has values of other types"),
        ({"pretrained_cfg": {"mean": [0.5], "std": [0.5]}}, "has values of other types"),
        ([1], "holds a list, not a JSON object"),
    ],
)
def test_unsupported_and_damaged_facts(tmp_path, config, message):
    with pytest.raises(WeightsError, match=message):
        _facts(tmp_path, config)


def test_open_keys_follow_and_given_ones_must_agree():
    config = config_lib.default()
    followed = follow(Facts(4, 1e-12, HALF), config, "hf")
    assert (followed.model.num_heads, followed.model.layer_norm_eps, followed.data.normalization) == (4, 1e-12, HALF)
    assert config.model.num_heads is None
    config.data.normalization = "imagenet"
    with pytest.raises(ConfigError, match=r"data\.normalization is 'imagenet', but the files beside hf say"):
        follow(Facts(None, None, HALF), config, "hf")
    numbers = "/".join(",".join(map(str, values)) for values in statistics_of("imagenet"))
    assert follow(Facts(None, None, numbers), config, "hf").data.normalization == "imagenet"


def test_facts_count_for_the_hubs_file_names_alone(tmp_path):
    _facts(tmp_path, VIT)
    for name in ("model.safetensors", "other.safetensors"):
        write_safetensors(str(tmp_path / name), dino_vit())
    for source in (tmp_path, tmp_path / "model.safetensors"):
        read = read_source(str(source), "teacher")
        same(read.arrays, dino_vit())
        assert read.facts == read_source_facts(str(source)) == Facts(12, 1e-12, None)
    assert read_source_facts(str(tmp_path / "other.safetensors")) == Facts()
