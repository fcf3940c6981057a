"""Checkpoints as DINO and EsViT write them with torch.save: imported and reproduced; pickles that would run a program."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from cmd_jax import config as config_lib
from cmd_jax.errors import WeightsError
from cmd_jax.models.build import make_network
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.weights.files import read_pickled
from cmd_jax.weights.read import read_source, recognise_source
from cmd_jax.weights.transfer import import_run, initial_weights
from tests.conftest import quick
from tests.interop.references import Head, dino_state, esvit_state, swin, tokens, vit

ROOT = Path(__file__).parent.parent.parent
MODELS = {
    "vit": {"model.name": "vit_micro", "model.patch_size": 8, "views.global_px": 32, "method.mil_scorer": "class_token"},
    # a Swin has no class token
    "swin": {"model.name": "swin_micro", "model.window": 2, "views.global_px": 64, "method.mil_scorer": "gated"},
}
HEADS = {
    "init.heads": True,
    "head.prototypes": 24,
    "head.hidden_dim": 16,
    "head.bottleneck_dim": 8,
    "head.norm_last_layer": False,
}


def _import(source, kind, workdir, keys=None):
    """Imports a checkpoint; returns what was noted, and a jitted function (images, method) of the network."""
    config = config_lib.default()
    config.update_from_flattened_dict({"views.local_px": 32, "init.weights": str(source), **MODELS[kind], **(keys or {})})
    notes = import_run(config, str(workdir))
    network = make_network(config_lib.load(str(workdir / "config.json")))
    checkpoints = Checkpoints(str(workdir), read_only=True)
    _, params = checkpoints.read_network("teacher")
    checkpoints.close()
    apply = lambda images, method=None: quick(lambda params: network.apply({"params": params}, images, method=method))(params)
    return "\n".join(notes), apply


def _images(image_px):
    return np.random.default_rng(0).normal(size=(2, image_px, image_px, 3)).astype(np.float32)


def _full(teacher, student):
    """What the references' training loops save."""
    return {
        "student": {f"module.{name}": value for name, value in student.items()},
        "teacher": teacher,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3), "step": 7}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", lr=5e-4, output_dir="out", aug_opt=["a", None]),
        "fp16_scaler": {"scale": 65536.0},
        "dino_loss": {"center": torch.arange(24.0)[None]},
    }


def test_a_backbone_of_dino(tmp_path):
    model, images = vit(), _images(32)
    torch.save(dino_state(model), tmp_path / "dino.pth")
    notes, apply = _import(tmp_path / "dino.pth", "vit", tmp_path / "run")
    assert "30 arrays of" in notes
    named = apply(images).backbone
    expected = tokens(model, images)
    np.testing.assert_allclose(named["cls_token"], expected[:, 0], atol=1e-4)
    np.testing.assert_allclose(named["patch_tokens"], expected[:, 1:], atol=1e-4)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_full_checkpoint_of_dino_with_its_head(tmp_path, legacy):
    model, images = vit(), _images(32)
    head = Head(96)
    teacher = {f"backbone.{name}": value for name, value in dino_state(model).items()}
    teacher |= {f"head.{name}": value for name, value in head.state_dict().items()}
    student = {name: value + 1 for name, value in teacher.items()}
    torch.save(_full(teacher, student), tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=not legacy)
    notes, apply = _import(tmp_path / "checkpoint.pth", "vit", tmp_path / "run", {"method.image_pool": "cls", **HEADS})
    assert "from the seed: region_head, region_last_layer" in notes
    encoded, (rows, _) = apply(images, "initialise")
    with torch.no_grad():
        expected = head(torch.from_numpy(tokens(model, images)[:, 0])).numpy()
    np.testing.assert_allclose(encoded.image_z @ rows.T, expected, atol=1e-4)
    read = read_source(str(tmp_path / "checkpoint.pth"), "student")
    assert recognise_source(str(tmp_path / "checkpoint.pth"), "student") == read.recognised
    np.testing.assert_array_equal(read.named.arrays["norm.weight"], model.layernorm.weight.detach().numpy() + 1)
    config = config_lib.load(str(tmp_path / "run" / "config.json"))
    centers = initial_weights(config, make_network(config)).centers
    assert list(centers) == ["centers/image"]
    np.testing.assert_array_equal(centers["centers/image"], np.arange(24))


def test_a_full_checkpoint_of_esvit_with_both_heads(tmp_path):
    model, images = swin(), _images(64)
    head, dense = Head(192), Head(192)
    teacher = esvit_state(model)
    teacher |= {f"head.{name}": value for name, value in head.state_dict().items()}
    teacher |= {f"head_dense.{name}": value for name, value in dense.state_dict().items()}
    torch.save(_full({f"module.{name}": value for name, value in teacher.items()}, teacher), tmp_path / "checkpoint.pth")
    notes, apply = _import(tmp_path / "checkpoint.pth", "swin", tmp_path / "run", {"method.image_pool": "mean", **HEADS})
    assert "backbone, image_head, image_last_layer, region_head, region_last_layer" in notes
    encoded, (image_rows, region_rows) = apply(images, "initialise")
    expected = tokens(model, images)
    np.testing.assert_allclose(encoded.patch_tokens, expected, atol=1e-4)
    with torch.no_grad():
        regions = torch.from_numpy(expected)
        np.testing.assert_allclose(encoded.image_z @ image_rows.T, head(regions.mean(1)).numpy(), atol=1e-4)
        np.testing.assert_allclose(encoded.region_z @ region_rows.T, dense(regions).numpy(), atol=1e-4)


class _Runs:
    """Unpickled without care, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_that_run_a_program_are_refused(tmp_path, legacy):
    trace = tmp_path / "trace"
    torch.save({"teacher": _Runs(trace)}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match=r"a\.pth was not read: it asks to run \w+\.system; only arrays"):
        read_source(str(tmp_path / "a.pth"), "teacher")
    assert not trace.exists()


def test_other_classes_than_the_namespace_are_refused(tmp_path):
    torch.save({"teacher": dino_state(vit()), "args": Path("x")}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"it asks to run pathlib\.\S+; only arrays"):
        read_source(str(tmp_path / "a.pth"), "teacher")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "it holds a list, not names with arrays"),
        ({"epoch": 3}, "it holds no arrays, but epoch"),
        ({"student": {"a": torch.zeros(1)}}, r"it has no teacher, but a student; set init\.network=student"),
    ],
)
def test_checkpoints_without_the_network(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=message):
        read_source(str(tmp_path / "a.pth"), "teacher")


@pytest.mark.parametrize("content", [b"", b"no pickle at all", b"PK\x03\x04 half a zip"])
def test_damaged_files(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=r"a\.pth was not read: it is damaged"):
        read_source(str(tmp_path / "a.pth"), "teacher")


def test_half_precision_and_shared_arrays(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": shared, "b": shared.T, "c": shared.to(torch.bfloat16)}, tmp_path / "a.pt")
    arrays = read_pickled(str(tmp_path / "a.pt"), "teacher")
    np.testing.assert_array_equal(arrays["b"], shared.T.numpy())
    assert arrays["c"].dtype == np.float32
    assert jax.tree.all(jax.tree.map(lambda array: array.dtype == np.float32, arrays))


def test_the_hub_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = "from cmd_jax.weights.read import read_source; read_source('hf:owner/none', 'teacher')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "WeightsError: hf:owner/none cannot be downloaded" in done.stderr
