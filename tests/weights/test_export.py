"""Files for timm and transformers: names, configurations, and what they cannot hold."""

import json

import numpy as np
import pytest

from cmd_jax.errors import WeightsError
from cmd_jax.models.swin import Swin
from cmd_jax.models.vit import ViT
from cmd_jax.weights.export import write_hugging_face, write_timm
from cmd_jax.weights.files import read_safetensors
from cmd_jax.weights.names import LAYOUTS, to_ours
from tests.weights.checkpoints import DEPTHS, EMBED, HEADS, WIDTH, WINDOW, dino_vit, esvit_swin, same

VIT = ViT(patch_size=8, width=WIDTH, depth=2, num_heads=2, mlp_dim=4 * WIDTH, table_px=32)
SWIN = Swin(width=EMBED, depths=DEPTHS, num_heads=HEADS, window=WINDOW, table_px=64)


def _ours(arrays, layout):
    return to_ours(arrays, LAYOUTS[layout])[0]


def test_timm(tmp_path):
    path = str(tmp_path / "new" / "vit.safetensors")
    write_timm(path, _ours(dino_vit(), "vit"), VIT)
    same(read_safetensors(path), dino_vit())
    path = str(tmp_path / "swin.safetensors")
    write_timm(path, _ours(esvit_swin(), "swin"), SWIN)
    names = set(read_safetensors(path))
    assert {"layers.1.downsample.norm.weight", "layers.3.downsample.reduction.weight"} <= names
    assert "layers.0.downsample.norm.weight" not in names


def test_hugging_face_vit(tmp_path):
    write_hugging_face(str(tmp_path / "out"), _ours(dino_vit(), "vit"), VIT, None)
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


def test_transformers_has_no_registers(tmp_path):
    arrays = _ours(dino_vit(), "vit") | {"backbone/register_tokens": np.zeros((1, 2, WIDTH), np.float32)}
    with pytest.raises(WeightsError, match="ViTModel has no backbone/register_tokens; pass --format=timm"):
        write_hugging_face(str(tmp_path / "out"), arrays, VIT, None)
    assert not (tmp_path / "out").exists()
    write_timm(str(tmp_path / "a.safetensors"), arrays, VIT)
    assert read_safetensors(str(tmp_path / "a.safetensors"))["pos_embed"].shape == (1, 19, WIDTH)


def test_swins_that_transformers_does_not_have(tmp_path):
    arrays = _ours(esvit_swin(), "swin")
    table = "backbone/layers_3_blocks_0/attn/relative_position_bias_table"
    with pytest.raises(WeightsError, match="windows of 1 and 2 tokens, transformers' SwinModel one window"):
        write_hugging_face(str(tmp_path / "out"), arrays | {table: arrays[table][:1]}, SWIN, None)
    odd = Swin(width=EMBED, depths=DEPTHS, num_heads=HEADS, window=WINDOW, table_px=72)
    with pytest.raises(WeightsError, match=r"views\.global_px is 72; .* multiples of 32; pass --format=timm"):
        write_hugging_face(str(tmp_path / "out"), arrays, odd, None)
    assert not (tmp_path / "out").exists()
