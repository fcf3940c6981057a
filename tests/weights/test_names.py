"""Every layout against names written out by hand, layouts of arrays, prefixes, and ways there and back."""

import numpy as np
import pytest

from cmd_jax.errors import WeightsError
from cmd_jax.weights.layouts import LAYOUTS, OURS
from cmd_jax.weights.names import to_ours, to_theirs
from tests.weights import checkpoints
from tests.weights.checkpoints import HIDDEN, WIDTH, dino_vit, esvit_swin, named, projection_head, same

BACKBONES = {"vit": dino_vit(), "swin": esvit_swin()}
# Files of every family -> the layout that they have.
FAMILIES = {
    "dino": (dino_vit(), "dino"),
    "dinov2": (checkpoints.dinov2(), "dino"),
    "dinov2 giant": (checkpoints.dinov2(gated=True, registers=False), "dino"),
    "dinov3": (checkpoints.dinov3(), "dinov3"),
    "dinov3 gated": (checkpoints.dinov3(gated=True), "dinov3"),
    "timm with registers": (checkpoints.timm_vit(), "timm"),
    "timm packed": (checkpoints.timm_vit(packed=True), "timm"),
    "timm eva": (checkpoints.timm_eva(), "timm_eva"),
    "timm eva gated, no biases": (checkpoints.timm_eva(gated=True, biases=False), "timm_eva"),
    "hf dinov2": (checkpoints.hf_dinov2(registers=False), "hf_dinov2"),
    "hf dinov2 with registers": (checkpoints.hf_dinov2(), "hf_dinov2"),
    "hf dinov2 gated": (checkpoints.hf_dinov2(gated=True), "hf_dinov2"),
    "hf dinov3": (checkpoints.hf_dinov3(), "hf_dinov3"),
    "hf dinov3 gated": (checkpoints.hf_dinov3(gated=True), "hf_dinov3"),
    "hf clip": (checkpoints.hf_clip(), "hf_clip"),
    "hf siglip": (checkpoints.hf_clip(class_token=False), "hf_clip"),
    "open_clip": (checkpoints.open_clip(), "open_clip"),
}
# Of each layout, where it puts the values of some arrays of the reference's state dict.
PLACES = {
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
    ours, unknown = to_ours(*named(BACKBONES[kind])[:2])
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


@pytest.mark.parametrize("key", PLACES)
def test_layouts_that_differ_in_their_names(key):
    layout = LAYOUTS[key]
    ours = _reference(layout.backbone)
    theirs, unplaced = to_theirs(ours, layout)
    assert not unplaced
    assert named(theirs).layout is layout
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


@pytest.mark.parametrize("name", FAMILIES)
def test_files_come_back_bit_for_bit(name):
    arrays, layout = FAMILIES[name]
    found = named(arrays)
    assert found.layout is LAYOUTS[layout]
    ours, unknown = to_ours(found.arrays, found.layout)
    assert not unknown
    assert len(ours) == len({*ours})
    key_bias = not any(part in name for part in ("eva", "hf dinov3"))
    theirs, unplaced = to_theirs(ours, found.layout, key_bias)
    assert not unplaced
    same(theirs, {name: array for name, array in arrays.items() if not name.endswith(("bias_mask", "periods"))})


def test_parts_of_a_layer_keep_their_order():
    arrays = checkpoints.dinov2(gated=True)
    ours, _ = to_ours(arrays, LAYOUTS["dino"])
    # SwiGLU of DINOv2: the first half of w12 goes through silu.
    np.testing.assert_array_equal(ours["backbone/blocks_1/mlp/gate/kernel"], arrays["blocks.1.mlp.w12.weight"][:HIDDEN].T)
    np.testing.assert_array_equal(ours["backbone/blocks_1/mlp/fc1/bias"], arrays["blocks.1.mlp.w12.bias"][HIDDEN:])
    arrays = checkpoints.hf_dinov3()
    ours, _ = to_ours(arrays, LAYOUTS["hf_dinov3"])
    query, key, value = np.split(ours["backbone/blocks_0/attn/qkv/bias"], 3)
    np.testing.assert_array_equal(query, arrays["layer.0.attention.q_proj.bias"])
    np.testing.assert_array_equal(value, arrays["layer.0.attention.v_proj.bias"])
    np.testing.assert_array_equal(key, 0)
    arrays = checkpoints.dinov3(gated=True)
    ours, _ = to_ours(named(arrays).arrays, LAYOUTS["dinov3"])
    np.testing.assert_array_equal(ours["backbone/blocks_0/mlp/gate/kernel"], arrays["blocks.0.mlp.w1.weight"].T)
    np.testing.assert_array_equal(ours["backbone/blocks_0/mlp/fc2/kernel"], arrays["blocks.0.mlp.w3.weight"].T)


def test_wrappers_of_the_families():
    vit, clip = dino_vit(), checkpoints.hf_clip()
    chunked = {name.replace("blocks.1.", "blocks.0.1.").replace("blocks.0.n", "blocks.0.0.n"): x for name, x in vit.items()}
    same(named({f"backbone.{name}": x for name, x in chunked.items()}).arrays, vit)
    both = {f"teacher.backbone.{name}": x for name, x in vit.items()}
    both |= {f"student.backbone.{name}": x + 1 for name, x in vit.items()}
    same(named(both).arrays, vit)
    same(named(both, "student").arrays, {name: x + 1 for name, x in vit.items()})
    moco = {f"module.momentum_encoder.{name}": x for name, x in vit.items()}
    moco |= {f"module.base_encoder.{name}": x + 1 for name, x in vit.items()}
    moco |= {"module.predictor.0.weight": np.zeros((2, 2), np.float32), "module.base_encoder.head.1.weight": np.zeros(2)}
    same(named(moco).arrays, vit)
    same(named(moco, "student").arrays, {name: x + 1 for name, x in vit.items()})
    same(named({f"module.base_encoder.{name}": x for name, x in vit.items()}).arrays, vit)
    text = {"text_model.encoder.layers.0.layer_norm1.weight": np.zeros(WIDTH), "logit_scale": np.zeros(())}
    whole = named(
        text | {"visual_projection.weight": np.zeros((4, 4))} | {f"vision_model.{name}": x for name, x in clip.items()}
    )
    same(whole.arrays, clip)
    assert set(whole.ignored) == {*text, "visual_projection.weight"}
    arrays = checkpoints.open_clip()
    text = {name: x for name, x in arrays.items() if name.startswith(("transformer", "positional"))}  # the text tower's too
    whole = named(text | {"visual.proj": np.zeros((4, 4))} | {f"visual.{name}": x for name, x in arrays.items()})
    same(whole.arrays, arrays)


def test_a_layout_with_misspelt_names_is_recognised():
    arrays = dict(BACKBONES["swin"])
    arrays["layers.0.downsample.norm.wait"] = arrays.pop("layers.0.downsample.norm.weight")
    assert named(arrays).layout is LAYOUTS["swin"]


@pytest.mark.parametrize("names", [set(), {"layer1.0.conv1.weight", "fc.weight", "norm.weight"}, {"head.mlp.0.weight"}])
def test_other_names_fit_no_layout(names):
    with pytest.raises(WeightsError, match="fit no known layout; known are ViT and Swin of DINO"):
        named(dict.fromkeys(names, np.zeros((2, 2), np.float32)))


@pytest.mark.parametrize("prefix", ["module.", "module.backbone.", "backbone.", "vit.", "swin."])
def test_prefixes_and_buffers_are_dropped(prefix):
    arrays = {f"{prefix}{name}": array for name, array in BACKBONES["swin"].items()}
    arrays[f"{prefix}layers.0.blocks.0.attn.relative_position_index"] = np.zeros((4, 4), np.int64)
    arrays[f"{prefix}layers.2.blocks.1.attn_mask"] = np.zeros((4, 4, 4), np.float32)
    same(named(arrays).arrays, BACKBONES["swin"])


def test_two_models_in_one_file_are_refused():
    with pytest.raises(WeightsError, match=r"module\.norm\.weight and another array are both norm\.weight"):
        named({"norm.weight": np.zeros(1), "module.norm.weight": np.zeros(1)})


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_heads_of_both_levels_there_and_back(layers, batch_norm):
    heads = projection_head("head", WIDTH, layers, batch_norm) | projection_head("head_dense", WIDTH, layers, batch_norm)
    theirs = named(BACKBONES["vit"] | heads).arrays
    ours, unknown = to_ours(theirs, LAYOUTS["dino"])
    assert not unknown
    np.testing.assert_array_equal(ours["region_last_layer/weight_v"], theirs["head_dense.last_layer.weight_v"])
    assert ours[f"image_head/mlp_{layers - 1}/kernel"].shape == (WIDTH if layers == 1 else 6, 5)
    assert ("image_head/norm_0/scale" in ours) == (batch_norm and layers > 1)
    again, unplaced = to_theirs(ours, LAYOUTS["dino"])
    assert not unplaced
    same(again, theirs)


def test_parameters_without_a_place_are_named():
    ours = {"backbone/register_tokens": np.zeros((1, 2, WIDTH), np.float32), "mil_scorer/out_kernel": np.zeros((3, 1))}
    assert set(to_theirs(ours, LAYOUTS["hf_vit"])[1]) == set(ours)
    assert to_theirs(ours, OURS) == (ours, [])
