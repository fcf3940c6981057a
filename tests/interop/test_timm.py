"""timm's models: their files are recognised and give their features, and our exports are loaded by timm."""

import json
import math
import re

import numpy as np
import pytest
from PIL import Image

import cmd_jax
from cmd_jax import config as config_lib
from cmd_jax.inference.export import export_run
from cmd_jax.normalization import statistics_of
from cmd_jax.weights.files import read_metadata, read_safetensors, write_safetensors
from cmd_jax.weights.transfer import import_run

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

TOLERANCE = 1e-4  # absolute, on tokens after norms whose scales are in 0.5..1.5
SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}
VIT = SMALL | {"img_size": 48, "patch_size": 8, "num_classes": 0, "dynamic_img_size": True}
EVA = SMALL | {"img_size": 48, "patch_size": 8, "num_classes": 0}
# name -> (architecture, arguments, tokens before the patches)
MODELS = {
    "vit": ("vit_small_patch16_224", VIT, 1),
    "vit all positions": ("vit_small_patch16_224", VIT | {"reg_tokens": 2}, 3),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", VIT, 5),
    "dinov2 gated": ("vit_giant_patch14_dinov2", VIT, 1),
    "clip": ("vit_base_patch16_clip_quickgelu_224", VIT, 1),
    "no class token": ("vit_base_patch16_siglip_224", VIT, 0),
    "dinov3": ("vit_small_patch16_dinov3", EVA, 5),
    "dinov3 gated": ("vit_small_plus_patch16_dinov3_qkvb", EVA, 5),
}


def _drawn(model):
    """Every parameter drawn wide, as in `families.draw`."""
    generator = torch.Generator().manual_seed(0)
    norms = {name for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if (module in norms and leaf == "weight") or leaf in ("gamma", "gamma_1", "gamma_2"):
            parameter.data = 0.5 + torch.rand(parameter.shape, generator=generator)
        else:
            spread = float(np.prod(parameter.shape[1:])) ** -0.5 if leaf == "weight" else 0.5
            parameter.data = spread * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def _saved(name, directory):
    """A model as timm's push to the hub writes it: model.safetensors and config.json."""
    architecture, arguments, special = MODELS[name]
    model = _drawn(timm.create_model(architecture, **arguments))
    arrays = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    directory.mkdir()
    write_safetensors(str(directory / "model.safetensors"), arrays)
    about = {key: model.pretrained_cfg[key] for key in ("mean", "std", "interpolation", "crop_mode")}
    about |= {"input_size": [3, 48, 48], "crop_pct": 1.0}
    config = {"architecture": architecture, "pretrained_cfg": about, "model_args": {"num_heads": SMALL["num_heads"]}}
    (directory / "config.json").write_text(json.dumps(config))
    return model, special


def _images(side):
    rng = np.random.default_rng(side)
    coarse = rng.integers(0, 256, (2, 4, 4, 3)).repeat(side // 4, axis=1).repeat(side // 4, axis=2)
    return np.clip(coarse + rng.integers(-60, 61, (2, side, side, 3)), 0, 255).astype(np.uint8)


def _tokens(model, images, statistics):
    mean, std = map(np.array, statistics)
    x = torch.from_numpy(np.moveaxis((images / 255 - mean) / std, -1, 1).astype(np.float32).copy())
    with torch.no_grad():
        return model.forward_features(x).numpy()


def _compare(ours, model, special, side):
    tokens = _tokens(model, _images(side), statistics_of(ours.config.data.normalization))
    assert tokens.std() > 0.5
    patches = ours.patch_tokens(_images(side))
    np.testing.assert_allclose(patches.reshape(2, -1, 48), tokens[:, special:], atol=TOLERANCE)
    if special:
        unit = tokens[:, 0] / np.linalg.norm(tokens[:, 0], axis=-1, keepdims=True)
        np.testing.assert_allclose(ours.embed(_images(side)), unit, atol=TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_timm(name, tmp_path):
    model, special = _saved(name, tmp_path / "hub")
    for side in (48, 80):
        _compare(cmd_jax.load(tmp_path / "hub", image_px=side, resize_px=side), model, special, side)
    whole = cmd_jax.load(tmp_path / "hub")
    assert (whole.crop_px, whole.config.eval.resize_px) == (48, 48)


@pytest.mark.parametrize("name", MODELS)
def test_exports_are_loaded_by_timm(name, tmp_path, monkeypatch):
    model, special = _saved(name, tmp_path / "hub")
    config = config_lib.default()
    config.init.weights = str(tmp_path / "hub")
    if not special:
        config.method.image_pool = "mean"
    import_run(config, str(tmp_path / "run"))
    path = str(tmp_path / "out.safetensors")
    export_run(str(tmp_path / "run"), None, "teacher", "timm", path)
    original = {key: value for key, value in model.state_dict().items() if not key.startswith("attn_pool.")}
    written = read_safetensors(path)
    assert written.keys() == original.keys()
    for key, value in original.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)
    about = json.loads(read_metadata(path)["config"])
    assert math.isclose(about["pretrained_cfg"]["crop_pct"], 1.0)
    again = timm.create_model(about["architecture"], num_classes=0, checkpoint_path=path, **about["model_args"]).eval()
    _compare(cmd_jax.load(path), again, special, 48)  # which says itself what it is
    card = (tmp_path / "out.safetensors.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    Image.fromarray(_images(48)[0]).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "card", "exec"), names)
    assert names["tokens"].shape == (1, special + 36, 48)
