"""Exports: programs that give our features in a process without this package, run by the code of their own model card."""

import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml
from PIL import Image

import cmd_jax
from cmd_jax import config as config_lib
from cmd_jax.config import ONE_CPU, validate
from cmd_jax.errors import ConfigError, DatasetError
from cmd_jax.inference import programs
from cmd_jax.inference.export import FORMATS, card_path, export_run
from cmd_jax.inference.load import Trained
from cmd_jax.inference.programs import inference, write_stablehlo
from cmd_jax.inference.run import encode, grid_side
from cmd_jax.models.build import init_params, make_backbone, make_network
from tests.conftest import quick

# Runs the Python of a card beside the file, with several images in the place of one, and keeps what it computed.
PROGRAM = """
import re, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("cmd_jax", "flax"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Absent())
card, out, *images = sys.argv[1:]
(code,) = re.findall(r"```python\\n(.*?)```", open(card).read(), re.DOTALL)
code = code.replace('[crop("image.jpg")]', f"[crop(path) for path in {images!r}]")
names = {}
exec(code, names)
import numpy
numpy.savez(out, images=names["images"], features=names["features"], weights=names["weights"])
"""


def run_card(card, out, images):
    """Arrays of a fresh process that knows jax and the card alone."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ""}
    command = [sys.executable, "-c", PROGRAM, os.path.basename(card), str(out), *map(str, images)]
    done = subprocess.run(command, cwd=os.path.dirname(card), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(out) as arrays:
        return dict(arrays)


def random_network(name, crop_px, **changes):
    """A network with parameters that hide no mistake: biases are not zero."""
    config = config_lib.default()
    config.model.name, config.views.global_px, config.views.local_count = name, crop_px, 0
    config.views.local_px = crop_px
    config.head.prototypes, config.head.hidden_dim, config.head.bottleneck_dim = 24, 16, 8
    for key, value in changes.items():
        section, _, leaf = key.partition("_")
        config[section][leaf] = value
    validate(config)
    config = config_lib.resolve(config, 0)
    network = make_network(config_lib.for_inference(config, ONE_CPU))  # no shape depends on the attention
    shapes = jax.eval_shape(lambda: init_params(config, network))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if leaf.ndim > 1:
            return (rng.normal(size=leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5).astype(np.float32)
        return (rng.normal(size=leaf.shape) * 0.1 + (path[-1].key == "scale")).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, {part: shapes[part] for part in ("backbone", "mil_scorer")})
    return Trained(config, params, 0, "teacher", name, "0" * 32)


OPTIONS = {
    "model_patch_size": 8,
    "model_class_token": False,
    "model_registers": 2,
    "model_positions": "rotary",
    "model_layer_scale": True,
    "model_gated_mlp": True,
    "model_activation": "silu",
    "model_pre_norm": True,
    "model_qkv_bias": "qv",
}


def coarse_images(side):
    """Three images of 16 coloured squares each, for which features differ: [3, side, side, 3] uint8."""
    squares = np.random.default_rng(1).integers(0, 256, (3, 4, 4, 3), np.uint8)
    return squares.repeat(side // 4, axis=1).repeat(side // 4, axis=2)


@pytest.fixture(scope="module")
def stablehlo(finished, tmp_path_factory):
    path = tmp_path_factory.mktemp("stablehlo") / "tiny.stablehlo"
    step, parameters = export_run(str(finished[0]), None, "teacher", "stablehlo", str(path))
    assert (step, parameters) == (6, 242_976 + 96 * 8 * 2 + 8)
    return path


def test_stablehlo_runs_without_the_package(stablehlo, finished, photo_folder, tmp_path):
    paths = sorted((photo_folder / "test").rglob("*.png"))[:5]
    found = run_card(f"{stablehlo}.md", tmp_path / "out.npz", paths)
    model = cmd_jax.load(finished[0])
    np.testing.assert_array_equal(found["images"], np.stack([model.crop(path) for path in paths]))
    np.testing.assert_allclose(found["features"], model.embed(paths), atol=1e-5)
    np.testing.assert_allclose(found["weights"], model.mil_weights(paths).reshape(5, -1), atol=1e-5)


def test_a_program_names_its_platforms_and_any_batch(stablehlo):
    program = jax.export.deserialize(bytearray(stablehlo.read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert str(program.in_avals[0].shape) == "(b, 16, 16, 3)"
    assert program.in_avals[0].dtype == np.uint8


@pytest.mark.parametrize(
    ("name", "crop_px", "changes"),
    [
        ("swin_micro", 64, {"model_window": 2, "eval_features": "mil+mean"}),  # with shifted windows
        ("vit_micro", 32, {"model_patch_size": 8, "model_registers": 2, "data_grayscale": True}),
        ("vit_micro", 32, OPTIONS),
    ],
    ids=["swin", "grey levels, registers", "options"],
)
def test_other_networks_are_programs_too(name, crop_px, changes, tmp_path):
    network, path = random_network(name, crop_px, **changes), tmp_path / "a.stablehlo"
    write_stablehlo(str(path), network)
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    images = coarse_images(network.config.eval.crop_px)
    if network.config.data.grayscale:  # luma is inside the program, before it for our own network
        gray = np.stack([np.asarray(Image.fromarray(image).convert("L").convert("RGB")) for image in images])
    else:
        gray = images
    expected = quick(lambda x: encode(network.config, make_backbone(network.config), network.params, x))(gray)
    assert grid_side(network.config) ** 2 == expected["mil_weights"].shape[1]
    for given, count in ((images, 3), (gray, 1)):
        outputs = quick(program.call)(given[:count])
        for name in programs.OUTPUTS:
            np.testing.assert_allclose(outputs[name], expected[name][:count], atol=1e-5, err_msg=name)
    assert np.std(expected["features"], axis=0).max() > 1e-2


def test_luma_is_pillows():
    levels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    levels[0, 0], levels[0, 1] = 255, 0
    expected = np.asarray(Image.fromarray(levels).convert("L").convert("RGB"))
    np.testing.assert_array_equal(programs._luma(levels[None])[0], expected)
    np.testing.assert_array_equal(programs._luma(expected[None])[0], expected)


def test_a_fused_kernel_does_not_reach_a_program():
    network = random_network("vit_micro", 16, model_patch_size=8, model_dtype="bfloat16", model_attention="cudnn")
    text = str(jax.make_jaxpr(inference(network))(np.zeros((2, 16, 16, 3), np.uint8)))
    assert "bf16" in text
    assert "scan" not in text
    assert "cudnn" not in text
    assert "bf16" not in str(jax.make_jaxpr(inference(network, "float32"))(np.zeros((2, 16, 16, 3), np.uint8)))


def test_onnx_without_its_converter_is_one_line(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--format=onnx needs jax2onnx, which is not installed; pip install '\.\[onnx\]'"):
        export_run(str(finished[0]), None, "teacher", "onnx", str(tmp_path / "a.onnx"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("form", "out", "wanted"),
    [
        ("safetensors", "directory", r"a file that ends in \.safetensors"),
        ("stablehlo", "a.onnx", r"a file that ends in \.stablehlo"),
        ("onnx", "a.safetensors", r"a file that ends in \.onnx"),
        ("hf", "a.stablehlo", "a directory"),
    ],
)
def test_a_name_of_another_format_is_refused(form, out, wanted, finished):
    with pytest.raises(ConfigError, match=rf"--out is '{out}'; --format={form} writes {wanted}"):
        export_run(str(finished[0]), None, "teacher", form, out)


@pytest.fixture
def evaluated(finished, tmp_path):
    """(workdir, function that writes metrics of step 6)."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(finished[0] / "checkpoints")
    shutil.copy(finished[0] / "config.json", run)

    def write(**content):
        (run / "eval" / "6").mkdir(parents=True, exist_ok=True)
        (run / "eval" / "6" / "metrics.json").write_text(json.dumps(content))

    return run, write


def _front(card):
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "onnx"])
def test_model_card_of_every_format(form, evaluated, tmp_path):
    run, write = evaluated
    write(
        step=6,
        metrics={"knn20_top1": 61.5, "spread": 0.25},
        protocol={"knn20_top1": "k=20, 12 | queries", "spread": "std"},
        title={"knn20_top1": "k-NN top-1"},
        unit={"knn20_top1": "percent", "spread": ""},
        interval={"knn20_top1": [55.25, 67.0]},
    )
    out = str(tmp_path / f"model{FORMATS[form].ending}")
    export_run(str(run), None, "teacher", form, out)
    with open(card_path(form, out), encoding="utf-8") as file:
        front, body = _front(file.read())
    (entry,) = front["model-index"]
    numbers = {metric["type"]: metric["value"] for metric in entry["results"][0]["metrics"]}
    assert numbers == {"knn20_top1": 61.5, "spread": 0.25}
    assert front["license"] == "other"
    assert r"| k-NN top-1 | 61.50 % | 55.25 to 67.00 | k=20, 12 \| queries |" in body
    assert "| spread | 0.25 |  | std |" in body
    for words in ("Licence", "Limitations", "Intended use", "step 6", "vit\\_micro", "16 px are read"):
        assert words in body, words
    assert ("MIL scorer" in body) == (form in ("safetensors", "stablehlo"))
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    compile(code, "card", "exec")
    assert repr(f"model{FORMATS[form].ending}").replace("'", '"') in code


def test_model_card_without_or_with_damaged_metrics(evaluated, tmp_path):
    run, write = evaluated
    out = str(tmp_path / "a.safetensors")
    export_run(str(run), 6, "teacher", "timm", out)
    front, body = _front((tmp_path / "a.safetensors.md").read_text())
    assert "model-index" not in front
    assert "This step was not evaluated." in body
    for content in (
        {"metrics": {"a": 1.0}, "protocol": {}},
        {"metrics": {"a": "many"}, "protocol": {"a": ""}},
        {"metrics": [1]},
    ):
        write(**content)
        with pytest.raises(DatasetError, match=r"eval/6/metrics\.json is damaged \(.*; evaluate again: cmd_jax\.eval"):
            export_run(str(run), 6, "teacher", "timm", out)
    export_run(str(run), 6, "student", "timm", out)  # whom the numbers do not belong to
    assert "This step was not evaluated." in (tmp_path / "a.safetensors.md").read_text()
