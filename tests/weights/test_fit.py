"""Fitting a checkpoint to a model: all differences in one error, tables of other sizes, heads, what is left out."""

import numpy as np
import pytest

from cmd_jax.errors import WeightsError
from cmd_jax.weights.fit import fit, resample_relative_positions
from cmd_jax.weights.layouts import LAYOUTS
from cmd_jax.weights.names import to_ours, to_theirs
from tests.weights.checkpoints import EMBED, WIDTH, dino_vit, esvit_swin, named, projection_head, same


def _shapes(arrays):
    return {name: array.shape for name, array in to_ours(*named(arrays)[:2])[0].items()}


def _with_heads(gain=None):
    return dino_vit() | projection_head("head", WIDTH, gain=gain) | projection_head("head_dense", WIDTH, gain=gain)


VIT = _shapes(dino_vit())
SWIN = _shapes(esvit_swin())


def test_a_backbone_is_fitted():
    model = _shapes(_with_heads())
    expected, _ = to_ours(dino_vit(), LAYOUTS["dino"])
    fitted = fit(named(dino_vit()), model, "a.safetensors", heads=False)
    same(fitted.arrays, expected)
    assert all(array.flags.c_contiguous for array in fitted.arrays.values())
    assert fitted.notes[0] == f"{len(VIT)} arrays of a.safetensors (DINO, DINOv2, MAE or timm ViT): backbone"
    assert fitted.notes[1] == "from the seed: image_head, image_last_layer, region_head, region_last_layer"


def test_one_error_lists_all_differences():
    arrays = dino_vit(depth=3)
    arrays["blocks.0.attn.kqv.weight"] = arrays.pop("blocks.0.attn.qkv.weight")
    arrays["blocks.1.mlp.fc1.bias"] = np.zeros(3, np.float32)
    arrays["blocks.0.extra.gamma"] = np.zeros(WIDTH, np.float32)
    with pytest.raises(WeightsError) as error:
        fit(named(arrays), VIT, "a.pth", heads=False)
    text = str(error.value)
    for part in (
        "a.pth (DINO, DINOv2, MAE or timm ViT) does not fit the model; set model.*",
        "16 array(s) differ",
        "blocks.0.attn.qkv.weight is missing (nearest: blocks.2.attn.qkv.weight, blocks.0.attn.kqv.weight)",
        "blocks.0.attn.kqv.weight is not in the model (nearest: blocks.0.attn.qkv.weight, blocks.1.attn.qkv.weight)",
        "blocks.0.extra.gamma is not in the model",
        "blocks.1.mlp.fc1.bias is (3,), the model's is (32,)",
    ):
        assert part in text, text
    assert text.endswith("; and 11 more")


def test_differences_have_the_names_of_the_file():
    theirs, _ = to_theirs(to_ours(dino_vit(), LAYOUTS["dino"])[0], LAYOUTS["hf_vit"])
    same(fit(named(theirs), VIT, "x", heads=False).arrays, to_ours(dino_vit(), LAYOUTS["dino"])[0])
    del theirs["encoder.layer.1.attention.attention.key.weight"]
    theirs["encoder.layer.0.attention.attention.value.bias"] = np.zeros(5, np.float32)
    with pytest.raises(WeightsError) as error:
        fit(named(theirs), VIT, "x", heads=False)
    assert "2 array(s) differ" in str(error.value)
    assert "encoder.layer.1.attention.attention.key.weight is missing" in str(error.value)
    assert "encoder.layer.0.attention.attention.value.bias is (5,), the model's is (8,)" in str(error.value)


def test_missing_registers_are_a_difference():
    model = VIT | {"backbone/register_tokens": (1, 2, WIDTH)}
    with pytest.raises(WeightsError, match="register_tokens is missing"):
        fit(named(dino_vit()), model, "x", heads=False)
    theirs, _ = to_theirs(to_ours(dino_vit(), LAYOUTS["dino"])[0], LAYOUTS["hf_vit"])
    with pytest.raises(WeightsError, match=r"1 array\(s\) differ: backbone/register_tokens is missing"):
        fit(named(theirs), model, "x", heads=False)


def test_a_backbone_of_another_kind_is_refused():
    with pytest.raises(WeightsError, match=r"x holds a EsViT Swin, but model\.name is a vit"):
        fit(named(esvit_swin()), VIT, "x", heads=False)
    with pytest.raises(WeightsError, match=r"x holds a DINO, DINOv2, MAE or timm ViT, but model\.name is a swin"):
        fit(named(dino_vit()), SWIN, "x", heads=False)
    with pytest.raises(WeightsError, match=r"^x: the names of the arrays \(fc\.weight\) fit no known layout"):
        fit(named({"fc.weight": np.zeros((2, 2))}), VIT, "x", heads=False)


def test_classifiers_are_ignored_with_a_note():
    extra = {
        name: np.zeros(2, np.float32)
        for name in ("head.weight", "head.bias", "head.fc.weight", "fc.bias", "classifier.weight", "pooler.dense.weight")
    }
    fitted = fit(named(dino_vit() | extra), VIT, "x", heads=False)
    assert set(fitted.arrays) == set(VIT)
    assert f"ignored, not a part of the networks here: {', '.join(extra)}" in fitted.notes


def test_position_tables_of_other_sizes_are_refused():
    with pytest.raises(WeightsError, match=r"pos_embed is \(1, 10, 8\), the model's is \(1, 17, 8\)"):
        fit(named(dino_vit(grid=3)), VIT, "x", heads=False)


def test_relative_position_tables_are_resampled():
    fitted = fit(named(esvit_swin(window=3)), SWIN, "x", heads=False)
    assert "5 relative-position tables resampled from window 3 to 2 (bicubic)" in fitted.notes
    name = "layers_2_blocks_1/attn/relative_position_bias_table"
    table = esvit_swin(window=3)[f"{name.replace('layers_2_blocks_1', 'layers.2.blocks.1').replace('/', '.')}"]
    np.testing.assert_array_equal(fitted.arrays[f"backbone/{name}"], resample_relative_positions(table, 9))


def test_relative_positions_by_hand():
    # From 5 x 5 to 1 x 1 the source is the middle; to 3 x 3 it lies at 1/3, 2, 11/3: t = 1/3 and 2/3 between neighbours.
    rows = np.arange(5.0)
    table = np.repeat(rows**3, 5)[:, None].astype(np.float32)  # depends on the row alone
    np.testing.assert_allclose(resample_relative_positions(table, 1), [[8.0]], rtol=1e-6)
    near = lambda x: 1.25 * x**3 - 2.25 * x**2 + 1
    far = lambda x: -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
    t = 1 / 3
    weights = np.array([far(1 + t), near(t), near(1 - t), far(2 - t)])
    first = weights @ (np.array([0, 0, 1, 2]) ** 3.0)  # the border is repeated
    last = weights[::-1] @ (np.array([2, 3, 4, 4]) ** 3.0)
    fitted = resample_relative_positions(table, 9).reshape(3, 3)
    np.testing.assert_allclose(fitted, np.array([[first], [8.0], [last]]) * np.ones((1, 3)), rtol=1e-5)


def test_heads_are_fitted_when_asked_for():
    arrays = _with_heads(gain=np.full((7, 1), 2.0, np.float32))
    model = _shapes(arrays) | {"mil_scorer/out_kernel": (3, 1)}
    fitted = fit(named(arrays), model, "x", heads=True)
    assert set(fitted.arrays) == set(model) - {"mil_scorer/out_kernel"}
    assert fitted.notes[-1] == "from the seed: mil_scorer"
    without = fit(named(arrays), model, "x", heads=False)
    assert set(without.arrays) == set(VIT)
    assert "not used: 16 arrays of projection heads; init.heads=True continues with them" in without.notes
    fitted = fit(named(dino_vit() | projection_head("head", WIDTH)), _shapes(_with_heads()), "x", heads=True)
    assert any(name.startswith("image_head/") for name in fitted.arrays)
    assert fitted.notes[-1] == "from the seed: region_head, region_last_layer"


def test_ibots_shared_head_is_fitted_once():
    """Its file has the last layer twice, and the student's mask token, which is new here."""
    arrays = dino_vit() | projection_head("head", WIDTH)
    second = {name.replace("last_layer", "last_layer2"): array for name, array in arrays.items() if "last_layer" in name}
    whole = arrays | second | {"masked_embed": np.ones((1, WIDTH), np.float32)}
    model = _shapes(arrays)
    fitted = fit(named(whole), model | {"mask_token": (1, 1, WIDTH)}, "x", heads=True)
    assert set(fitted.arrays) == set(model)
    assert fitted.notes[-1] == "from the seed: mask_token"
    apart = fit(named(whole), _shapes(_with_heads()), "x", heads=True)
    same(*({"v": apart.arrays[f"{level}_last_layer/weight_v"]} for level in ("region", "image")))
    whole["head.last_layer2.weight_v"] = 2 * whole["head.last_layer2.weight_v"]
    with pytest.raises(WeightsError, match=r"other prototypes for patches than for images; set head\.share_prototypes=False"):
        fit(named(whole), model, "x", heads=True)


def test_missing_and_other_heads_are_refused():
    model = _shapes(_with_heads())
    with pytest.raises(WeightsError, match=r"x has no projection heads; leave init\.heads=False"):
        fit(named(dino_vit()), model, "x", heads=True)
    other = model | {"image_last_layer/weight_v": (9, 5)}
    with pytest.raises(WeightsError, match=r"head\.last_layer\.weight_v is \(7, 5\), the model's is \(9, 5\)"):
        fit(named(_with_heads()), other, "x", heads=True)


def test_learned_gains_need_a_model_with_gains():
    unit = {name: shape for name, shape in _shapes(_with_heads()).items() if not name.endswith("weight_g")}
    assert set(fit(named(_with_heads()), unit, "x", heads=True).arrays) == set(unit)
    with pytest.raises(WeightsError, match=r"learned gain.*set head\.norm_last_layer=False"):
        fit(named(_with_heads(gain=np.full((7, 1), 1.5, np.float32))), unit, "x", heads=True)


def test_swin_with_both_heads():
    arrays = esvit_swin() | projection_head("head", 8 * EMBED) | projection_head("head_dense", 8 * EMBED)
    model = _shapes(arrays)
    fitted = fit(named({f"module.{name}": array for name, array in arrays.items()}), model, "x", heads=True)
    assert set(fitted.arrays) == set(model)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_numbers_not_finite_are_refused(value):
    arrays = dino_vit()
    arrays["blocks.1.mlp.fc1.bias"] = np.array(arrays["blocks.1.mlp.fc1.bias"])
    arrays["blocks.1.mlp.fc1.bias"][2] = value
    with pytest.raises(WeightsError, match=r"a\.pth: blocks\.1\.mlp\.fc1\.bias has 1 of 32 numbers that are NaN or infinite"):
        fit(named(arrays), VIT, "a.pth", heads=False)


@pytest.mark.parametrize("dtype", [np.int8, bool])
def test_quantised_kernels_are_refused(dtype):
    arrays = dino_vit()
    arrays["blocks.0.attn.qkv.weight"] = np.zeros_like(arrays["blocks.0.attn.qkv.weight"], dtype)
    with pytest.raises(WeightsError, match=rf"blocks\.0\.attn\.qkv\.weight holds {np.dtype(dtype)} numbers; quantised"):
        fit(named(arrays), VIT, "a.pth", heads=False)


def test_unused_arrays_are_not_checked():
    others = {"head.weight": np.array([np.nan], np.float32), "relative_position_index": np.zeros(3, np.int64)}
    others |= {"decoder_embed.weight": np.array([np.inf], np.float32), "decoder_pos_embed": np.zeros(3, np.float32)}
    expected = fit(named(dino_vit()), VIT, "a.pth", heads=False).arrays
    assert fit(named(dino_vit() | others), VIT, "a.pth", heads=False).arrays.keys() == expected.keys()
