"""What files are, by their names, shapes and the JSON beside them; and how a configuration follows them."""

import numpy as np
import pytest

from cmd_jax import config as config_lib
from cmd_jax.errors import ConfigError, WeightsError
from cmd_jax.normalization import statistics_of
from cmd_jax.weights import recognise as recognise_module
from cmd_jax.weights.names import identify, stand_ins
from cmd_jax.weights.preparation import Beside, prepared
from cmd_jax.weights.read import follow
from cmd_jax.weights.recognise import Recognised, recognise
from tests.weights import checkpoints

CLIP = "0.48145466,0.4578275,0.40821073/0.26862954,0.26130258,0.27577711"
HALF = "0.5,0.5,0.5/0.5,0.5,0.5"


NOTHING = Beside()


def _recognised(arrays, beside=NOTHING, source="a.safetensors"):
    return recognise(identify(arrays, "teacher", source), beside, source)


def _keys(arrays, *beside, **more):
    """Without the sections' names."""
    return {key.partition(".")[2]: value for key, value in _recognised(arrays, *beside, **more).keys.items()}


def _vit(width, depth, patch=16, side=14, prefix="", more=None):
    """Shapes of a plain ViT of DINO's names, of any size, without memory."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + side * side, width), "norm.weight": (width,)}
    shapes |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)} | (more or {})
    for index in range(depth):
        shapes |= {f"blocks.{index}.mlp.fc1.weight": (4 * width, width), f"blocks.{index}.mlp.fc2.weight": (width, 4 * width)}
        shapes |= {f"blocks.{index}.attn.qkv.weight": (3 * width, width), f"blocks.{index}.attn.qkv.bias": (3 * width,)}
    return stand_ins({f"{prefix}{name}": shape for name, shape in shapes.items()})


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        (_vit(384, 12), {"name": "vit_small", "num_heads": 6, "table_px": 224, "crop_px": 224, "resample_rule": "dino"}),
        (_vit(384, 12, prefix="module.momentum_encoder."), {"name": "vit_small", "num_heads": 12}),
        (_vit(1024, 24, 14, 16), {"name": "vit_large", "num_heads": 16, "patch_size": 14, "table_px": 224}),
        (_vit(768, 12, more={"blocks.0.ls1.gamma": (768,)}, patch=14, side=37), {"table_px": 518, "crop_px": 224}),
        (_vit(1280, 32, more={"storage_tokens": (1, 4, 1280), "rope_embed.periods": (16,)}), {"num_heads": 20}),
    ],
    ids=["plain", "moco", "large", "dinov2", "dinov3"],
)
def test_sizes_and_heads_of_known_networks(arrays, expected):
    if "storage_tokens" in arrays:
        del arrays["pos_embed"]
    found = _keys(arrays)
    assert {key: found[key] for key in expected} == expected


FAMILIES = {
    "dinov2": (
        checkpoints.dinov2(),
        {"layer_scale": True, "registers": 2, "positions": "class_patches", "resample_rule": "antialiased"},
    ),
    "dinov2 gated": (
        checkpoints.dinov2(gated=True, registers=False),
        {"gated_mlp": True, "activation": "silu", "mlp_dim": 12, "resample_rule": "dino"},
    ),
    "dinov3": (
        checkpoints.dinov3(),
        {"positions": "rotary", "rope_base": 100.0, "qkv_bias": "qv", "layer_norm_eps": 1e-5, "num_heads": 2},
    ),
    "eva": (checkpoints.timm_eva(biases=False), {"positions": "rotary", "qkv_bias": "none", "layer_norm_eps": 1e-5}),
    "eva with biases": (checkpoints.timm_eva(), {"qkv_bias": "qv", "registers": 2}),
    "timm": (checkpoints.timm_vit(), {"registers": 2, "resample_rule": "antialiased", "layer_norm_eps": 1e-6}),
    "hf dinov2": (checkpoints.hf_dinov2(registers=False), {"resample_rule": "size", "layer_scale": True}),
    "hf dinov3": (checkpoints.hf_dinov3(gated=True), {"qkv_bias": "qv", "gated_mlp": True, "resize_mode": "squash"}),
    "clip": (
        checkpoints.hf_clip(),
        {"pre_norm": True, "activation": "quick_gelu", "layer_norm_eps": 1e-5, "resample_rule": "size", "normalization": CLIP},
    ),
    "siglip": (
        checkpoints.hf_clip(class_token=False),
        {"class_token": False, "positions": "patches", "activation": "gelu_tanh", "normalization": HALF, "pre_norm": False},
    ),
    "open_clip": (checkpoints.open_clip(), {"activation": "gelu", "resample_rule": "antialiased", "normalization": CLIP}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_by_names_and_shapes(name):
    arrays, expected = FAMILIES[name]
    found = _keys(arrays)
    assert {key: found[key] for key in expected} == expected
    assert (found["name"], found["width"], found["depth"], found["patch_size"]) == ("vit", 8, 2, 8)


@pytest.mark.parametrize(
    ("registers", "rows", "expected"),
    [(0, 17, "class_patches"), (2, 17, "class_patches"), (2, 19, "all"), (2, 16, "patches"), (0, 16, "patches")],
)
def test_rows_of_the_table_tell_who_has_positions(registers, rows, expected):
    more = {"reg_token": (1, registers, 8)} if registers else {}
    arrays = _vit(8, 1, 8, 4, more=more) | stand_ins({"pos_embed": (1, rows, 8)})
    found = _keys(arrays)
    assert (found["positions"], found["table_px"]) == (expected, 32)
    with pytest.raises(WeightsError, match=r"a table of 13 positions, .* no square of patches; only square tables"):
        _keys(arrays | stand_ins({"pos_embed": (1, 13, 8)}))


def test_files_beside_win():
    config = {"model_type": "vit", "num_attention_heads": 4, "layer_norm_eps": 1e-12, "hidden_act": "gelu_new"}
    found = _keys(_vit(384, 12), Beside(config))
    assert (found["num_heads"], found["layer_norm_eps"], found["activation"]) == (4, 1e-12, "gelu_tanh")
    timm = {"architecture": "vit_base_patch16_clip_quickgelu_224", "model_args": {"num_heads": 3}}
    found = _keys(_vit(384, 12, more={"norm_pre.weight": (384,)}), Beside(timm))
    assert (found["num_heads"], found["activation"], found["layer_norm_eps"]) == (3, "quick_gelu", 1e-5)
    clip = {"vision_config": {"num_attention_heads": 2, "hidden_act": "gelu"}, "num_attention_heads": 9}
    found = _keys(checkpoints.hf_clip(), Beside(clip))
    assert (found["num_heads"], found["activation"]) == (2, "gelu")
    assert _keys(_vit(1152, 27), Beside({"architecture": "vit_so400m_patch14_siglip_224"}))["num_heads"] == 16
    with pytest.raises(WeightsError, match="has the activation 'relu'; known are gelu"):
        _keys(_vit(8, 1), Beside({"hidden_act": "relu"}))


def test_one_line_says_what_it_is():
    arrays = _vit(384, 12, 14, 37, more={"blocks.0.ls1.gamma": (384,), "register_tokens": (1, 4, 384)})
    assert _recognised(arrays).line == (
        "DINOv2 with 4 registers: ViT-small/14, width 384, 12 blocks, 6 heads, LayerScale, table of 518 px"
    )
    assert _recognised(checkpoints.hf_dinov3(gated=True)).line == (
        "DINOv3 with 2 registers (transformers): ViT/8, width 8, 2 blocks, LayerScale, gated MLPs, rotary positions"
    )


def test_swins_by_their_tables():
    arrays = checkpoints.esvit_swin()
    with pytest.raises(WeightsError, match=r"a Swin of width 4, \(1, 1, 2, 1\) blocks and \(1, 2, 2, 4\) heads; there are"):
        _recognised(arrays)
    wide = {}
    for name, array in arrays.items():  # swin_micro: 24 channels, heads 1, 2, 4, 8
        table = name.endswith("relative_position_bias_table")
        heads = {"0": 1, "1": 2, "2": 4, "3": 8}[name.split(".")[1]] if table else None
        whole = table and name.startswith("layers.3.")
        shape = (1 if whole else 9, heads) if table else (24, 3, 4, 4) if array.ndim == 4 else array.shape
        wide[name] = np.broadcast_to(np.float32(0), shape)
    found = _keys(wide)
    # in the last stage the map is one token, so the image has 32 px
    assert (found["name"], found["window"], found["table_px"], found["layer_norm_eps"]) == ("swin_micro", 2, 32, 1e-6)


def _prepared(*beside, family="ViT", table_px=224):
    found = recognise_module._prepared(prepared(Beside(*beside)), family, table_px)
    return tuple(found.get(f"eval.{key}") for key in ("resize_mode", "resize_px", "crop_px", "interpolation"))


def test_preparation_of_transformers():
    by_shorter = {"shortest_edge": 256}
    square = {"height": 224, "width": 224}
    cases = [
        ({"image_processor_type": "ViTImageProcessor", "size": square, "resample": 2}, ("squash", 224, 224, "bilinear")),
        ({"feature_extractor_type": "ViTFeatureExtractor", "size": 384}, ("squash", 384, 384, "bilinear")),
        (
            {"image_processor_type": "BitImageProcessor", "size": by_shorter, "do_center_crop": True, "crop_size": square},
            ("shorter_side", 256, 224, "bicubic"),
        ),
        (
            {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "do_center_crop": True, "crop_size": 224},
            ("shorter_side", 224, 224, "bicubic"),
        ),
        ({"size": {"height": 256, "width": 256}, "crop_size": 224, "do_center_crop": True}, ("squash", 256, 224, "bilinear")),
        ({"size": by_shorter, "do_center_crop": False, "crop_size": 224}, ("shorter_side", 256, 256, "bicubic")),
    ]
    for preprocessor, expected in cases:
        assert _prepared({}, preprocessor) == expected, preprocessor


def test_preparation_of_timm_and_open_clip():
    timm = {"input_size": [3, 240, 240], "crop_pct": 0.9, "interpolation": "bilinear", "crop_mode": "squash"}
    assert _prepared({"pretrained_cfg": timm}) == ("squash", 266, 240, "bilinear")
    assert _prepared({"pretrained_cfg": {"input_size": [3, 518, 518], "crop_pct": 1.0}}) == (None, 518, 518, None)
    model = {"model_cfg": {"vision_cfg": {"image_size": 256}}, "preprocess_cfg": {"resize_mode": "squash"}}
    assert _prepared({}, {}, model) == ("squash", 256, 256, "bicubic")
    assert _prepared(table_px=384) == (None, None, 384, None)
    assert _prepared(family="DINOv3", table_px=None) == ("squash", 224, 224, "bilinear")


MEAN_STD = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


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
def test_normalization_equals_that_of_transformers(preprocessor):
    """The oracle: transformers rescales uint8 pixels, then subtracts the mean and divides."""
    pixels = np.arange(30, dtype=np.float64).reshape(10, 3) * 8
    expected = pixels * (preprocessor.get("rescale_factor", 1 / 255) if preprocessor.get("do_rescale", True) else 1)
    if preprocessor.get("do_normalize", True):
        expected = (expected - preprocessor["image_mean"]) / preprocessor["image_std"]
    found = prepared(Beside({}, preprocessor))["data.normalization"]
    mean, std = map(np.array, statistics_of(found))
    np.testing.assert_allclose((pixels / 255 - mean) / std, expected, rtol=1e-6, atol=1e-6)


def _given(**keys):
    config = config_lib.default()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in keys.items()})
    return config


DINOV2 = _recognised(_vit(384, 12, 14, 37, more={"blocks.0.ls1.gamma": (384,)}))


def test_open_keys_follow():
    config = config_lib.default()
    followed = config_lib.resolve(follow(DINOV2, config, "x", whole_crop=False), 0)
    assert config.model.name is None
    assert (followed.model.name, followed.model.table_px, followed.views.global_px) == ("vit_small", 518, 224)
    assert (followed.eval.crop_px, followed.eval.resize_px) == (224, 256)
    wide = Recognised(DINOV2.keys | {"eval.crop_px": 518, "eval.resize_px": 518, "eval.resize_mode": "squash"}, "")
    trained = config_lib.resolve(follow(wide, config, "x", whole_crop=False), 0)
    assert (trained.views.global_px, trained.eval.crop_px, trained.eval.resize_px) == (224, 224, 224)
    whole = config_lib.resolve(follow(wide, config, "x", whole_crop=True), 0)
    assert (whole.views.global_px, whole.eval.crop_px, whole.eval.resize_px) == (518, 518, 518)
    assert whole.eval.resize_mode == "squash"
    asked = follow(wide, _given(views__global_px=112, eval__resize_px=140, eval__resize_mode="shorter_side"), "x", True)
    assert (asked.views.global_px, asked.eval.resize_px, asked.eval.resize_mode) == (112, 140, "shorter_side")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model__name", "vit_base", r"model\.name is 'vit_base', but x says 'vit_small'; leave model\.name out"),
        ("model__patch_size", 16, r"model\.patch_size is 16, but x says 14"),
        ("model__registers", 4, r"model\.registers is 4, but x says 0"),
        ("model__layer_scale", False, r"model\.layer_scale is False, but x says True"),
        ("model__num_heads", 12, r"model\.num_heads is 12, but x says 6"),
        ("model__layer_norm_eps", 1e-5, r"model\.layer_norm_eps is 1e-05, but x says 1e-06"),
        ("data__normalization", "imagenet", r"data\.normalization is 'imagenet', but x says '0\.5"),
    ],
)
def test_keys_that_contradict_are_refused(key, value, message):
    said = Beside({"num_attention_heads": 6, "layer_norm_eps": 1e-6}, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    file = _recognised(_vit(384, 12, 14, 37, more={"blocks.0.ls1.gamma": (384,)}), said)
    with pytest.raises(ConfigError, match=message):
        follow(file, _given(**{key: value}), "x", False)


def test_what_no_file_says_can_be_given():
    given = _given(model__num_heads=12, model__layer_norm_eps=1e-5, data__normalization=HALF, model__resample_rule="size")
    followed = follow(DINOV2, given, "x", False)
    assert (followed.model.num_heads, followed.model.layer_norm_eps, followed.model.resample_rule) == (12, 1e-5, "size")
    assert (followed.data.normalization, followed.model.activation) == (HALF, "gelu")


def test_keys_that_agree_are_accepted():
    numbers = "/".join(",".join(map(str, values)) for values in statistics_of("imagenet"))
    said = DINOV2._replace(usual=frozenset())
    followed = follow(said, _given(data__normalization=numbers, model__name="vit_small", model__patch_size=14), "x", False)
    assert followed.data.normalization == numbers
    own = _given(model__name="vit", model__width=384, model__depth=12, model__num_heads=6)
    assert follow(DINOV2, own, "x", False).model.name == "vit"


def test_heads_of_unknown_files_are_asked_for():
    unknown = _recognised(_vit(256, 3))
    with pytest.raises(ConfigError, match=r"x does not say how many attention heads its 256 channels have; set"):
        follow(unknown, config_lib.default(), "x", False)
    assert follow(unknown, _given(model__num_heads=8), "x", False).model.num_heads == 8
