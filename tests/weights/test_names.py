"""Every layout against names written out by hand, layouts of arrays, prefixes, and ways there and back."""

import numpy as np
import pytest

from cmd_jax.errors import WeightsError
from cmd_jax.weights.names import LAYOUTS, OURS, detect_layout, strip_prefixes, to_ours, to_theirs
from tests.weights.checkpoints import WIDTH, dino_vit, esvit_swin, projection_head, same

BACKBONES = {"vit": dino_vit(), "swin": esvit_swin()}
# Of each layout, where it puts the values of some arrays of the reference's state dict.
PLACES = {
    "vit": {"blocks.1.attn.qkv.weight": "blocks.1.attn.qkv.weight"},
    "swin": {"layers.2.blocks.1.attn.qkv.bias": "layers.2.blocks.1.attn.qkv.bias"},
    "timm_swin": {
        "layers.0.downsample.norm.weight": "layers.1.downsample.norm.weight",
        "layers.2.downsample.reduction.weight": "layers.3.downsample.reduction.weight",
        "layers.2.blocks.1.mlp.fc1.weight": "layers.2.blocks.1.mlp.fc1.weight",
    },
    "hf_vit": {
        "blocks.1.norm1.weight": "encoder.layer.1.layernorm_before.weight",
        "blocks.1.attn.proj.weight": "encoder.layer.1.attention.output.dense.weight",
        "blocks.1.norm2.bias": "encoder.layer.1.layernorm_after.bias",
        "blocks.0.mlp.fc1.weight": "encoder.layer.0.intermediate.dense.weight",
        "blocks.0.mlp.fc2.bias": "encoder.layer.0.output.dense.bias",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "pos_embed": "embeddings.position_embeddings",
        "cls_token": "embeddings.cls_token",
        "norm.weight": "layernorm.weight",
    },
    "hf_swin": {
        "patch_embed.norm.weight": "embeddings.norm.weight",
        "layers.2.blocks.1.norm2.weight": "encoder.layers.2.blocks.1.layernorm_after.weight",
        "layers.2.blocks.1.attn.relative_position_bias_table": (
            "encoder.layers.2.blocks.1.attention.self.relative_position_bias_table"
        ),
        "layers.1.downsample.reduction.weight": "encoder.layers.1.downsample.reduction.weight",
        "norm.bias": "layernorm.bias",
    },
}
QKV = {
    "hf_vit": ("blocks.1.attn.qkv", "encoder.layer.1.attention.attention"),
    "hf_swin": ("layers.2.blocks.1.attn.qkv", "encoder.layers.2.blocks.1.attention.self"),
}


def _reference(kind):
    ours, unknown = to_ours(BACKBONES[kind], LAYOUTS[kind])
    assert not unknown
    return ours


def test_arrays_get_our_names_and_layouts():
    vit, theirs = _reference("vit"), BACKBONES["vit"]
    np.testing.assert_array_equal(vit["backbone/blocks_1/attn/qkv/kernel"], theirs["blocks.1.attn.qkv.weight"].T)
    np.testing.assert_array_equal(vit["backbone/blocks_0/norm2/scale"], theirs["blocks.0.norm2.weight"])
    np.testing.assert_array_equal(vit["backbone/patch_embed/kernel"][3, 5, 1], theirs["patch_embed.proj.weight"][:, 1, 3, 5])
    swin, theirs = _reference("swin"), BACKBONES["swin"]
    table = "relative_position_bias_table"
    np.testing.assert_array_equal(swin[f"backbone/layers_2_blocks_1/attn/{table}"], theirs[f"layers.2.blocks.1.attn.{table}"])
    np.testing.assert_array_equal(
        swin["backbone/layers_0_downsample/reduction/kernel"], theirs["layers.0.downsample.reduction.weight"].T
    )
    np.testing.assert_array_equal(swin["backbone/patch_norm/scale"], theirs["patch_embed.norm.weight"])


@pytest.mark.parametrize("key", LAYOUTS)
def test_every_layout_is_reversed_bit_for_bit(key):
    layout = LAYOUTS[key]
    ours = _reference(layout.backbone)
    theirs, unplaced = to_theirs(ours, layout)
    assert not unplaced
    assert detect_layout(set(theirs), "x") is layout
    again, unknown = to_ours(theirs, layout)
    assert not unknown
    same(again, ours)
    for reference, name in PLACES[key].items():
        np.testing.assert_array_equal(theirs[name], BACKBONES[layout.backbone][reference], err_msg=name)
    if key in QKV:
        packed, prefix = QKV[key]
        for leaf in ("weight", "bias"):
            joined = np.concatenate([theirs[f"{prefix}.{part}.{leaf}"] for part in ("query", "key", "value")])
            np.testing.assert_array_equal(joined, BACKBONES[layout.backbone][f"{packed}.{leaf}"])


def test_a_layout_with_misspelt_names_is_recognised():
    arrays = dict(BACKBONES["swin"])
    arrays["layers.0.downsample.norm.wait"] = arrays.pop("layers.0.downsample.norm.weight")
    assert detect_layout(set(arrays), "x") is LAYOUTS["swin"]


@pytest.mark.parametrize("names", [set(), {"layer1.0.conv1.weight", "fc.weight", "norm.weight"}, {"head.mlp.0.weight"}])
def test_other_names_fit_no_layout(names):
    with pytest.raises(WeightsError, match="fit no known layout; known are ViT and Swin of DINO"):
        detect_layout(names, "x")


@pytest.mark.parametrize("prefix", ["module.", "module.backbone.", "backbone.", "vit.", "swin."])
def test_prefixes_and_buffers_are_dropped(prefix):
    arrays = {f"{prefix}{name}": array for name, array in BACKBONES["swin"].items()}
    arrays[f"{prefix}layers.0.blocks.0.attn.relative_position_index"] = np.zeros((4, 4), np.int64)
    arrays[f"{prefix}layers.2.blocks.1.attn_mask"] = np.zeros((4, 4, 4), np.float32)
    same(strip_prefixes(arrays), BACKBONES["swin"])


def test_two_models_in_one_file_are_refused():
    with pytest.raises(WeightsError, match=r"module\.norm\.weight and another array are both norm\.weight"):
        strip_prefixes({"norm.weight": np.zeros(1), "module.norm.weight": np.zeros(1)})


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_heads_of_both_levels_there_and_back(layers, batch_norm):
    heads = projection_head("head", WIDTH, layers, batch_norm) | projection_head("head_dense", WIDTH, layers, batch_norm)
    theirs = strip_prefixes(BACKBONES["vit"] | heads)
    ours, unknown = to_ours(theirs, LAYOUTS["vit"])
    assert not unknown
    np.testing.assert_array_equal(ours["region_last_layer/weight_v"], theirs["head_dense.last_layer.weight_v"])
    assert ours[f"image_head/mlp_{layers - 1}/kernel"].shape == (WIDTH if layers == 1 else 6, 5)
    assert ("image_head/norm_0/scale" in ours) == (batch_norm and layers > 1)
    again, unplaced = to_theirs(ours, LAYOUTS["vit"])
    assert not unplaced
    same(again, theirs)


def test_parameters_without_a_place_are_named():
    ours = {"backbone/register_tokens": np.zeros((1, 2, WIDTH), np.float32), "mil_scorer/out_kernel": np.zeros((3, 1))}
    assert set(to_theirs(ours, LAYOUTS["hf_vit"])[1]) == set(ours)
    assert to_theirs(ours, OURS) == (ours, [])


def test_position_tables_of_timm():
    arrays = BACKBONES["vit"] | {"reg_token": np.full((1, 2, WIDTH), 3.0, np.float32)}
    cls, patches = np.split(arrays["pos_embed"], [1], axis=1)
    spanning = np.concatenate([cls, np.full((1, 2, WIDTH), 0.5, np.float32), patches], axis=1)
    ours, _ = to_ours(arrays | {"pos_embed": spanning}, LAYOUTS["vit"])
    np.testing.assert_array_equal(ours["backbone/pos_embed"], arrays["pos_embed"])
    np.testing.assert_array_equal(ours["backbone/register_tokens"], np.full((1, 2, WIDTH), 3.5))
    theirs, _ = to_theirs(ours, LAYOUTS["vit"])
    assert theirs["pos_embed"].shape == spanning.shape
    same(to_ours(theirs, LAYOUTS["vit"])[0], ours)

    ours, _ = to_ours(arrays | {"pos_embed": patches}, LAYOUTS["vit"])
    np.testing.assert_array_equal(ours["backbone/pos_embed"][:, 1:], patches)
    np.testing.assert_array_equal(ours["backbone/pos_embed"][:, 0], 0)
    np.testing.assert_array_equal(ours["backbone/register_tokens"], arrays["reg_token"])
