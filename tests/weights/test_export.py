"""Files for timm and transformers: names, configurations, and what they cannot hold."""

import json
import math

import numpy as np
import pytest

from cmd_jax import config as config_lib
from cmd_jax.errors import WeightsError
from cmd_jax.models.swin import Swin
from cmd_jax.models.vit import ViT
from cmd_jax.weights import export
from cmd_jax.weights.export import write_hugging_face, write_timm
from cmd_jax.weights.files import read_safetensors
from cmd_jax.weights.layouts import LAYOUTS
from cmd_jax.weights.names import to_ours
from cmd_jax.weights.preparation import Beside, prepared
from cmd_jax.weights.read import read_source, recognise_source
from tests.weights.checkpoints import DEPTHS, EMBED, HEADS, WIDTH, WINDOW, dino_vit, esvit_swin, same

VIT = ViT(patch_size=8, width=WIDTH, depth=2, num_heads=2, mlp_dim=4 * WIDTH, table_px=32)
SWIN = Swin(width=EMBED, depths=DEPTHS, num_heads=HEADS, window=WINDOW, table_px=64)


def _ours(arrays, layout):
    return to_ours(arrays, LAYOUTS[layout])[0]


@pytest.fixture
def config():
    config = config_lib.default()
    config.views.global_px, config.eval.resize_px = 64, 72
    config.data.normalization = "0.5,0.5,0.5/0.5,0.5,0.5"
    return config_lib.resolve(config, 0)


def test_timm(tmp_path, config):
    path = str(tmp_path / "new" / "vit.safetensors")
    write_timm(path, _ours(dino_vit(), "dino"), VIT, config)
    same(read_safetensors(path), dino_vit())
    path = str(tmp_path / "swin.safetensors")
    write_timm(path, _ours(esvit_swin(), "swin"), SWIN, config)
    names = set(read_safetensors(path))
    assert {"layers.1.downsample.norm.weight", "layers.3.downsample.reduction.weight"} <= names
    assert "layers.0.downsample.norm.weight" not in names


def test_timm_says_what_it_is(tmp_path, config):
    path = str(tmp_path / "vit.safetensors")
    odd = VIT.clone(layer_norm_eps=1e-12, resample_rule="size", activation="quick_gelu")
    config.eval.resize_mode, config.eval.interpolation = "squash", "bilinear"
    write_timm(path, _ours(dino_vit(), "dino"), odd, config)
    keys = recognise_source(path, "teacher").keys
    expected = {
        "model.num_heads": 2,
        "model.layer_norm_eps": 1e-12,
        "model.resample_rule": "size",
        "model.activation": "quick_gelu",
        "data.normalization": config.data.normalization,
        "eval.crop_px": 64,
        "eval.resize_px": 72,
        "eval.resize_mode": "squash",
        "eval.interpolation": "bilinear",
    }
    assert {key: keys[key] for key in expected} == expected


@pytest.mark.parametrize("resize_px", range(224, 300, 3))
def test_timm_resizes_to_the_same_side(resize_px, config, tmp_path):
    """timm resizes to the whole part of crop / crop_pct."""
    config.eval.crop_px, config.eval.resize_px = 224, resize_px
    share = export._pretrained_cfg(config)["crop_pct"]
    assert math.floor(224 / share) == resize_px


def test_hugging_face_vit(tmp_path):
    write_hugging_face(str(tmp_path / "out"), _ours(dino_vit(), "dino"), VIT, None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {
        "model_type": "vit",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 8,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
    }
    assert {key: config[key] for key in expected} == expected
    assert "encoder.layer.1.attention.attention.key.bias" in read_safetensors(str(tmp_path / "out" / "model.safetensors"))


def test_hugging_face_swin(tmp_path):
    write_hugging_face(str(tmp_path / "out"), _ours(esvit_swin(), "swin"), SWIN, None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {"model_type": "swin", "embed_dim": 4, "depths": [1, 1, 2, 1], "window_size": 2, "image_size": 64}
    assert {key: config[key] for key in expected} == expected


REGISTERS = {"backbone/register_tokens": np.ones((1, 2, WIDTH), np.float32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"registers": 2}, r"transformers' ViTModel has model\.registers 0 alone, and this is 2; pass --format=timm"),
        ({"class_token": False, "positions": "patches"}, r"has model\.class_token True alone, and this is False; .*timm"),
        ({"positions": "rotary"}, r"DINOv3ViTModel has model\.layer_scale True alone, .* pass --format=safetensors"),
        ({"pre_norm": True, "layer_scale": True}, r"CLIPVisionModel has model\.layer_scale False alone"),
        (
            {"layer_scale": True, "mlp_dim": 9},
            "Dinov2Model has no MLPs of 9 units with gelu for a width of 8",
        ),
    ],
)
def test_what_transformers_does_not_have(change, message, tmp_path):
    with pytest.raises(WeightsError, match=message):
        write_hugging_face(str(tmp_path / "out"), {}, VIT.clone(**change), None)
    assert not (tmp_path / "out").exists()


def test_what_timm_does_not_have(tmp_path, config):
    for change, message in (
        ({"qkv_bias": "qv"}, r"timm's VisionTransformer has model\.qkv_bias 'qkv' or 'none' alone, and this is 'qv'"),
        ({"positions": "rotary"}, r"timm's Eva has model\.qkv_bias 'qv' or 'none' alone, and this is 'qkv'; .*=safetensors"),
        ({"gated_mlp": True}, r"timm's gated MLPs have model\.activation 'silu' alone, and this is 'gelu'"),
    ):
        with pytest.raises(WeightsError, match=message):
            write_timm(str(tmp_path / "a.safetensors"), {}, VIT.clone(**change), config)


def test_timm_has_no_row_for_the_class_token_alone(tmp_path, config):
    """With registers: the token takes its row, and the sum that the network computes is the same."""
    arrays, path = _ours(dino_vit(), "dino") | REGISTERS, str(tmp_path / "a.safetensors")
    write_timm(path, arrays, VIT.clone(registers=2), config)
    read = read_source(path, "teacher")
    assert (read.recognised.keys["model.positions"], read.recognised.keys["model.table_px"]) == ("patches", 32)
    ours, _ = to_ours(read.named.arrays, read.named.layout)
    table = arrays["backbone/pos_embed"]
    np.testing.assert_array_equal(ours["backbone/cls_token"], arrays["backbone/cls_token"] + table[:, :1])
    np.testing.assert_array_equal(ours["backbone/pos_embed"], table[:, 1:])
    np.testing.assert_array_equal(ours["backbone/register_tokens"], arrays["backbone/register_tokens"])


@pytest.mark.parametrize(
    ("mode", "crop", "kind"),
    [("squash", 64, "ViTImageProcessor"), ("squash", 48, "DeiTImageProcessor"), ("shorter_side", 48, "BitImageProcessor")],
)
def test_preprocessors_say_how_images_are_prepared(mode, crop, kind, config):
    config.eval.update({"resize_mode": mode, "crop_px": crop, "resize_px": 64, "interpolation": "lanczos"})
    written = export.preprocessor_config(config)
    assert written["image_processor_type"] == kind
    assert prepared(Beside({}, written)) == {
        "data.normalization": config.data.normalization,
        "eval.resize_mode": mode,
        "eval.crop_px": crop,
        "eval.resize_px": 64,
        "eval.interpolation": "lanczos",
    }


def test_swins_that_transformers_does_not_have(tmp_path):
    arrays = _ours(esvit_swin(), "swin")
    table = "backbone/layers_3_blocks_0/attn/relative_position_bias_table"
    with pytest.raises(WeightsError, match="windows of 1 and 2 tokens, transformers' SwinModel one window"):
        write_hugging_face(str(tmp_path / "out"), arrays | {table: arrays[table][:1]}, SWIN, None)
    odd = Swin(width=EMBED, depths=DEPTHS, num_heads=HEADS, window=WINDOW, table_px=72)
    with pytest.raises(WeightsError, match=r"model\.table_px is 72; .* multiples of 32; pass --format=timm"):
        write_hugging_face(str(tmp_path / "out"), arrays, odd, None)
    assert not (tmp_path / "out").exists()
