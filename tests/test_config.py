"""Keys and their rules, presets, open values, tuples of flags, and errors that name key, value, rule and remedy."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from cmd_jax import config as config_lib
from cmd_jax.cli import TupleParser
from cmd_jax.config import Hardware, default, flatten, presets, validate
from cmd_jax.errors import ConfigError
from cmd_jax.training.sharding import check_mesh

CONFIGS = Path(__file__).parent.parent / "configs"
TERMS = ("intra_image", "intra_region", "inter_student", "inter_teacher", "relation", "released", "intra_masked")
FINE_GRAINED = ("", *presets.PRESETS)
REFERENCES = [name for name in FINE_GRAINED if name not in ("small", "continue", "continue_small")]
PRESETS = {
    "demo": ("", "paper_objective", "smoke"),
    "folder": ("", "continue", "continue_small", "small", "small_paper_objective", "paper"),
    "cub": FINE_GRAINED,
    "cars": FINE_GRAINED,
    "aircraft": (*FINE_GRAINED, "family", "manufacturer"),
    "nabirds": FINE_GRAINED,
}


def _file(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_config_file_is_covered():
    assert {path.stem for path in CONFIGS.glob("*.py")} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_before_and_after_resolve(name):
    module = _file(name)
    for preset in PRESETS[name]:
        config = module.get_config(preset)
        if config.data.source == "folder":
            config.data.folder = "photos"
        if preset.startswith("continue"):
            config.init.weights = "weights.safetensors"
        validate(config)
        resolved = config_lib.resolve(config, 5994)
        validate(resolved)
        json.dumps(resolved.to_dict())
    with pytest.raises(ConfigError, match=r"unknown preset 'typo'; use .*paper"):
        module.get_config("typo")


def test_config_files_load_outside_the_repository(tmp_path):
    program = (
        "import sys; from ml_collections import config_flags\n"
        "get = lambda name: config_flags.config_flags.ConfigFileFlagParser('config').parse(name)\n"
        "print(*[get(path).data.source for path in sys.argv[1:]])"
    )
    command = [sys.executable, "-c", program, *(f"{CONFIGS / name}.py:{PRESETS[name][1]}" for name in PRESETS)]
    environment = {"PYTHONPATH": str(CONFIGS.parent), "PATH": ""}
    out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["synthetic_birds", "folder", "cub", "cars", "aircraft", "nabirds"]


def test_reference_presets_have_their_values():
    resolved = {name: config_lib.resolve(_file("cub").get_config(name), 5994) for name in REFERENCES}
    assert resolved[""].to_dict() == resolved["vit_s16"].to_dict()
    assert {config.train.epochs for config in resolved.values()} == {300.0}
    paper, released = resolved["paper"], resolved["released"]
    assert (paper.model.name, paper.model.window, paper.model.patch_size) == ("swin_tiny", 14, 4)
    method = paper.method
    assert (method.image_pool, method.region_matching, method.mil_scorer, method.mil_temp) == ("mil", "similarity", "gated", 1)
    assert (resolved["esvit"].model.window, resolved["esvit"].method.image_pool) == (7, "mean")
    assert (released.method.released_weight, released.model.window) == (1.0, 14)
    for config in (paper, released):
        assert (config.train.batch_size, config.method.momentum_batch_size) == (8, 8)
        assert config.optim.lr * config.train.batch_size / 256 == pytest.approx(1.56e-5, rel=2e-3)  # of train_nfg.bat
    for name in ("paper", "esvit", "released"):
        method = resolved[name].method
        temps = (method.warmup_teacher_temp, method.teacher_temp, method.warmup_teacher_temp_epochs)
        assert (*temps, method.teacher_momentum) == (0.04, 0.07, 30, 0.996)
        assert (resolved[name].head.prototypes, resolved[name].head.norm_last_layer) == (65_536, False)
    assert (resolved["dino"].method.teacher_temp, resolved["dino"].method.warmup_teacher_temp) == (0.04, 0.04)


def test_paper_preset_ignores_the_size_of_the_data():
    of_size = {images: config_lib.resolve(_file("cub").get_config("paper"), images) for images in (100, 100_000)}
    assert of_size[100].to_dict() == of_size[100_000].to_dict()
    own = config_lib.resolve(_file("folder").get_config("paper"), 100).to_dict()
    assert {key for key, value in own.items() if value != of_size[100].to_dict()[key]} == {"data"}


def test_larger_backbones_get_smaller_batches():
    gpu = Hardware("gpu", memory_bytes=80 * 2**30, cuda=True)
    config, sizes = default(), []
    for name, px in (("vit_small", 224), ("vit_large", 224), ("vit_large", 518)):
        config.update_from_flattened_dict({"model.name": name, "model.patch_size": 14, "views.global_px": px})
        sizes.append(config_lib.resolve(config, 50_000, gpu).train.batch_size)
    assert sizes == [64, 16, 4]
    config.init.weights, config.init.freeze_blocks = "weights.safetensors", 18
    assert config_lib.resolve(config, 50_000, gpu).train.batch_size == 16


def test_small_data_changes_prototypes_teacher_and_ema():
    small, large = (config_lib.resolve(default(), count) for count in (5994, 50_000))
    assert small.head.prototypes < large.head.prototypes == 65_536
    assert small.method.teacher_temp < large.method.teacher_temp == 0.04
    assert small.method.teacher_momentum < large.method.teacher_momentum == 0.996


def test_init_weights_change_the_recipe():
    scratch, config = config_lib.resolve(default(), 5994), default()
    config.init.weights = "weights.safetensors"
    continued = config_lib.resolve(config, 5994)
    assert (scratch.optim.lr, scratch.optim.layer_decay, scratch.train.epochs) == (5e-4, 1.0, 100.0)
    assert continued.optim.layer_decay < 1 < continued.train.epochs < scratch.train.epochs
    assert 0 < continued.optim.freeze_backbone_epochs < continued.optim.warmup_epochs < continued.train.epochs
    epochs = [config_lib.resolve(config, count).train.epochs for count in (100, 1000, 50_000)]
    assert epochs == sorted(set(epochs), reverse=True)
    config.optim.lr, config.train.epochs = 0.1, 7.0
    given = config_lib.resolve(config, 5994)
    assert (given.optim.lr, given.train.epochs) == (0.1, 7.0)
    for preset in ("paper", "released", "esvit", "dino"):  # the references' recipes, wherever they start
        values = [_file("cub").get_config(preset) for _ in range(2)]
        values[1].init.weights = "weights.safetensors"
        before, after = (config_lib.resolve(value, 5994).to_dict() for value in values)
        assert before.pop("init") != after.pop("init")
        assert before == after


def test_continue_presets_need_weights():
    for name in ("cub", "cars", "aircraft", "nabirds", "folder"):
        for preset in ("continue", "continue_small"):
            config = _file(name).get_config(preset)
            config.data.folder = "PHOTOS"
            with pytest.raises(ConfigError, match=r"init\.weights is empty; pass --config\.init\.weights=SOURCE"):
                validate(config)
            config.init.weights, config.model.patch_size = "weights.safetensors", 14
            validate(config)
            views = config_lib.resolve(config, 5994).views
            assert (views.global_px, views.local_px) == {"continue": (224, 98), "continue_small": (112, 42)}[preset]


def test_start_name():
    config = default()
    assert config_lib.start_name(config) == "random weights"
    config.init.weights = "hf:facebook/dino-vits16"
    assert config_lib.start_name(config) == "weights of hf:facebook/dino-vits16"


@pytest.mark.parametrize("name", config_lib.METHODS)
def test_method_fills_open_values_alone(name):
    config = default()
    config.method.name = name
    resolved = config_lib.resolve(config, 1000)
    assert resolved.head.share_mlp == resolved.head.share_prototypes == (name == "ibot")
    resolved = resolved.method
    expected = {
        "cmd": (0.5, 0.5, 1.0, 1.0, 0.0, 0.0, 0.0),
        "cmd_bag": (1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        "cmd_relation": (0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0),
        "esvit": (0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0),
        "released": (0.5, 0.5, 0.0, 0.0, 0.0, 1.0, 0.0),
        "dino": (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        "ibot": (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
    }[name]
    assert tuple(resolved[f"{term}_weight"] for term in TERMS) == expected
    config.method.inter_student_weight = 0.25
    assert config_lib.resolve(config, 1000).method.inter_student_weight == 0.25


@pytest.mark.parametrize("term", TERMS)
def test_each_term_is_an_objective_by_itself(term):
    config = default()
    for other in TERMS:
        config.method[f"{other}_weight"] = float(other == term)
    validate(config)
    validate(config_lib.resolve(config, 1000))


@pytest.mark.parametrize("name", ["dino", "esvit"])
def test_references_are_evaluated_with_their_pool(name):
    config = default()
    config.method.name = name
    assert config_lib.resolve(config, 1000).eval.features == {"dino": "cls", "esvit": "mean"}[name]
    config.method.image_pool = "cls+mean"
    validate(config)
    resolved = config_lib.resolve(config, 1000)
    assert resolved.eval.features == "cls+mean"
    validate(resolved)


# A value of every key that breaks its rule: of the wrong type, out of bounds, not a number, absurd.
BAD_VALUES = {
    "int": [-2, 2**64, 1.5, True, "many", float("nan")],
    "float": [-1.0, float("nan"), float("inf"), -float("inf"), 1e30, True, "much", (1.0,)],
    "str": [3, True, ("a",), "\0"],
    "bool": [1, "yes", 0.0],
    "tuple": [(), (1.0,) * 3, 1.0, (float("nan"), 0.5), (-1.0, 0.5), ("a", "b"), (True, True), "ab"],
}


def _set(config, key, value):
    """Sets a value as it is: a ConfigDict would turn True into 1.0 where a number was."""
    *section, name = key.split(".")
    part = config[section[0]] if section else config
    if name in part:
        del part[name]
    part[name] = value


@pytest.mark.parametrize("key", sorted(flatten(default())))
def test_every_key_refuses_bad_values(key):
    *section, name = key.split(".")
    usual = flatten(default())[key]
    kind = (default()[section[0]] if section else default()).get_type(name).__name__
    refused = BAD_VALUES[kind] + ([] if usual is None else [None])
    if key in ("eval.knn_k", "eval.fractions", "eval.linear_lrs"):  # of any length
        refused.remove((1.0,) * 3)
    for value in refused:
        config = default()
        config.data.source = "cub"
        _set(config, key, value)
        with pytest.raises(ConfigError) as caught:
            validate(config)
        message = str(caught.value)
        assert message.startswith(f"{key} is {value!r}"), message
        assert f"; it must be {config_lib.KEYS[key].rule.allowed}" in message, message


# Values that break a rule, and how the message goes on.
REFUSED = [
    ({"method.name": "moco"}, "method.name is 'moco'; it must be one of cmd, cmd_bag, cmd_relation, esvit,"),
    (
        {"train.batch_size": 10**9},
        "train.batch_size is 1000000000; it must be a whole number of at least 1 and at most 1,048,576",
    ),
    ({"mesh.data": 0}, "mesh.data is 0; it must be -1, or a whole number of at least 1"),
    ({"optim.lr": float("nan")}, "optim.lr is nan; it must be a number above 0 and at most 100"),
    ({"eval.knn_k": (10, 0)}, "eval.knn_k is (10, 0); it must be one or more numbers, each a whole number of at least 1"),
    ({"views.global_blur_prob": (1.0,)}, "views.global_blur_prob is (1.0,); it must be 2 numbers, each a number of at least 0"),
    ({"eval.features": "cls+foo"}, "eval.features is 'cls+foo'; it must be one of cls, mean, mil, blocks, or several like"),
    (
        {"method.image_pool": "mil+mil"},
        "method.image_pool is 'mil+mil'; it must be one of mil, cls, mean, or several like cls+mean",
    ),
    ({"data.source": "imagenet"}, "data.source is 'imagenet'; it must be one of synthetic_birds, cub"),
    ({"data.source": "tfds:"}, "data.source is 'tfds:', without a name; use tfds:NAME"),
    ({"data.source": "folder"}, "data.source=folder needs data.folder; pass --config.data.folder=DIR"),
    ({"data.eval_source": "folder"}, "data.eval_source=folder needs data.eval_folder; pass --config.data.eval_folder=DIR"),
    ({"data.eval_source": "birds"}, "data.eval_source is 'birds'; it must be one of synthetic_birds"),
    ({"views.local_scale": (0.4, 0.1)}, "views.local_scale is (0.4, 0.1); it needs low <= high, a share"),
    (
        {"views.blur_sigma": (2.0, 0.1)},
        "views.blur_sigma is (2.0, 0.1); it needs low <= high, in pixels, for example",
    ),
    (
        {"method.mask_share": (0.5, 0.1)},
        "method.mask_share is (0.5, 0.1); it needs low <= high, a share, for example (0.1, 0.5)",
    ),
    (
        {"method.name": "ibot", "method.image_pool": "cls+mean"},
        "head.share_mlp is True, but method.image_pool 'cls+mean' is wider than a patch; set it to False, or",
    ),
    (
        {"head.share_mlp": True, "method.image_pool": "mil", "method.mil_scorer": "class_token"},
        "head.share_mlp is True, but method.image_pool 'mil' of several heads (method.mil_scorer=class_token) is wider than",
    ),
    (
        {"method.name": "ibot", "views.global_px": 16, "views.local_px": 16},
        "method.intra_masked_weight is 1.0, but a view of views.global_px=16 is one patch of 16 pixels, with no others to",
    ),
    ({"views.global_px": 220}, "views.global_px is 220; it must be a multiple of model.patch_size=16; use 208 or 224"),
    ({"views.local_px": 8}, "views.local_px is 8; it must be a multiple of model.patch_size=16; use 16"),
    ({"eval.resize_px": 200, "eval.crop_px": 224}, "eval.resize_px is 200, less than eval.crop_px=224; raise it"),
    ({"train.best_metric": "eval_map", "eval.protocols": ("knn",)}, "train.best_metric is 'eval_map', but eval.protocols is"),
    ({"train.batch_size": 6, "train.accumulate": 4}, "train.accumulate is 4, which does not divide train.batch_size=6"),
    (
        {"optim.warmup_epochs": 200.0, "train.epochs": 100.0},
        "optim.warmup_epochs is 200.0, longer than train.epochs=100.0; use a tenth of the epochs",
    ),
    ({f"method.{term}_weight": 0.0 for term in TERMS}, "all weights of the objective are 0; set method.intra_image_weight"),
    (
        {"method.mil_scorer": "mean", "method.mil_heads": 4},
        "method.mil_heads is 4, but method.mil_scorer 'mean' learns none; set it to 1, or the scorer to gated",
    ),
    ({"model.attention": "cudnn", "model.dtype": "float32"}, "model.attention is 'cudnn', which takes no float32"),
    (
        {"model.product_dtype": "float32", "model.dtype": "bfloat16"},
        "model.product_dtype is 'float32' and model.dtype 'bfloat16'; a product has operands of the narrower one",
    ),
    ({"model.name": "vit", "model.width": 96}, "model.name is 'vit', of no size of its own; set model.depth"),
    ({"model.width": 96}, "model.width is 96, but that of model.name=vit_small is 384; leave it out, or set model.name=vit"),
    ({"model.num_heads": 5}, "model.num_heads is 5, and a width of 384 is not 5 times a multiple of 1; use another number"),
    (
        {"model.num_heads": 64, "model.positions": "rotary"},
        "model.num_heads is 64, and a width of 384 is not 64 times a multiple",
    ),
    ({"init.freeze_blocks": 4}, "init.freeze_blocks is 4, but without init.weights they are random"),
    (
        {"init.freeze_blocks": 13, "init.weights": "x", "model.name": "vit_small"},
        "init.freeze_blocks is 13, but there are 12 blocks; use at most that",
    ),
    ({"model.class_token": False, "method.name": "dino"}, "method.image_pool is 'cls', but the model has no class token; pass"),
    ({"model.class_token": False, "model.positions": "class_patches"}, "model.positions is 'class_patches', but model.class"),
]
REFUSED_OF_SWIN = [
    ({"method.name": "dino"}, "method.image_pool is 'cls', but swin_tiny has no class token; pass --config.method.image_pool="),
    (
        {"method.image_pool": "mean+cls+mil"},
        "method.image_pool is 'mean+cls+mil', but swin_tiny has no class token; pass --config.method.image_pool=mean+mil,",
    ),
    ({"eval.features": "mil+cls"}, "eval.features is 'mil+cls', but swin_tiny has no class token; use mean"),
    ({"method.mil_scorer": "class_token"}, "method.mil_scorer is 'class_token', but swin_tiny has no class token; set it to"),
    ({"model.patch_size": 8, "views.local_px": 92}, "model.patch_size is 8, but a Swin's is 4; set it to that"),
    ({"model.registers": 4}, "model.registers is 4, but swin_tiny is a Swin"),
    ({"model.num_heads": 4}, "model.num_heads is 4, but swin_tiny fixes the heads of its stages"),
    ({"views.local_px": 98}, "views.local_px is 98; it must be a multiple of model.patch_size=4; use 96 or 100"),
    ({"model.attention": "cudnn", "model.dtype": "bfloat16"}, "model.attention is 'cudnn', but swin_tiny adds a bias"),
    ({"model.packed_views": True}, "model.packed_views is True, but swin_tiny has blocks of several shapes"),
]


@pytest.mark.parametrize(
    ("values", "message"), REFUSED + [({"model.name": "swin_tiny"} | values, message) for values, message in REFUSED_OF_SWIN]
)
def test_error_names_value_rule_and_remedy(values, message):
    config = default()
    config.update_from_flattened_dict(values)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        validate(config)


def test_unknown_and_missing_keys_are_named():
    for key, remedy in (("optim.lrr", "did you mean optim.lr?"), ("colour", "see docs/configs.md")):
        config = default()
        _set(config, key, 1.0)
        with pytest.raises(ConfigError, match=re.escape(f"unknown config key {key}; {remedy}")):
            validate(config)
    config = default()
    del config.optim["min_lr"]
    with pytest.raises(ConfigError, match=r"config key optim\.min_lr is missing; set it, its default is 1e-06"):
        validate(config)


def test_keys_of_earlier_versions_are_read(tmp_path):
    stored = config_lib.resolve(default(), 1000).to_dict()
    del stored["mesh"]["shard_state"]
    stored["mesh"] |= {"fsdp": True, "model": 1}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(stored))
    for config in (config_lib.load(str(path)), config_lib.from_dict(stored)):
        validate(config)
        assert config.mesh.to_dict() == {"data": -1, "shard_state": True}
    assert config_lib.read_json(str(path))["mesh"] == {"data": -1, "shard_state": True}
    stored["mesh"]["model"] = 2
    with pytest.raises(ConfigError, match=r"mesh\.model is 2, but this key is gone; only runs with mesh.model=1 can be read"):
        config_lib.from_dict(stored)


GIB = 2**30


def _cpu(devices=1):
    return Hardware("cpu", devices)


def _h100(devices):
    return Hardware("gpu", devices, 60 * GIB)


def _v5e(devices):
    return Hardware("tpu", devices, 15 * GIB)


@pytest.mark.parametrize(
    ("hardware", "images", "options", "dtype", "batch"),
    [
        (_cpu(), 5994, {}, "float32", 64),
        (_cpu(8), 5994, {}, "float32", 64),  # a machine, not a device
        (_cpu(), 24, {}, "float32", 24),
        (_cpu(5), 5994, {}, "float32", 60),  # they divide it
        (_cpu(), 0, {}, "float32", 64),  # unknown
        (_h100(1), 5994, {}, "bfloat16", 64),
        (_h100(8), 5994, {}, "bfloat16", 512),
        (_h100(16), 5994, {}, "bfloat16", 1024),  # DINO's
        (_h100(64), 100_000, {}, "bfloat16", 1024),
        (_h100(16), 500, {}, "bfloat16", 96),  # five steps an epoch
        (_h100(6), 40, {}, "bfloat16", 36),
        (_v5e(8), 5994, {}, "bfloat16", 256),  # its memory holds 32 images a device
        (_v5e(8), 5994, {"train.accumulate": 2}, "bfloat16", 256),  # which saves memory
        (Hardware("tpu", 8), 5994, {}, "bfloat16", 512),  # of unknown memory
        (_h100(16), 5994, {"train.batch_size": 32, "model.dtype": "float32"}, "float32", 32),  # explicit: the whole batch
    ],
)
def test_open_precision_and_batch_follow_the_hardware(hardware, images, options, dtype, batch):
    config = default()
    config.update_from_flattened_dict(options)
    resolved = config_lib.resolve(config, images, hardware)
    assert (resolved.model.dtype, resolved.train.batch_size) == (dtype, batch)
    assert (resolved.model.teacher_dtype, resolved.model.product_dtype) == (dtype, dtype)
    check_mesh(resolved, hardware.devices)


def test_open_values_of_speed_follow_the_hardware():
    def resolved(platform, cuda=False, **options):
        config = default()
        config.update_from_flattened_dict(options)
        config = config_lib.resolve(config, 100_000, Hardware(platform, memory_bytes=80 * 2**30, cuda=cuda))
        names = ("packed_views", "scan_blocks", "remat", "attention")
        return [config.model[key] for key in names] + [config.method.prototype_chunk, config.method.matched_targets]

    assert resolved("cpu") == [True, True, "dots", "xla", 256, "gathered"]
    small = {"train.batch_size": 4, "head.prototypes": 4096}
    assert resolved("cpu", **small) == [True, True, "none", "xla", 4096, "expected"]
    assert resolved("gpu", cuda=True) == [True, False, "none", "cudnn", 8192, "expected"]
    assert resolved("gpu", cuda=True, **{"model.dtype": "float32"})[3] == "xla"
    assert resolved("gpu")[3] == "xla"  # ROCm
    assert resolved("tpu") == [False, False, "none", "xla", 256, "expected"]
    assert resolved("gpu", **{"model.name": "swin_tiny"})[:3] == [False, False, "none"]
    assert resolved("gpu", **{"model.remat": "full"})[1]


def test_fused_attention_needs_nvidia_except_for_inference():
    config = default()
    config.model.update(dtype="bfloat16", attention="cudnn")
    config = config_lib.resolve(config, 1000)
    nvidia, rocm = Hardware("gpu", cuda=True), Hardware("gpu")
    config_lib.check_attention(config, nvidia)
    with pytest.raises(ConfigError, match="needs NVIDIA GPUs, but the devices are gpu"):
        config_lib.check_attention(config, rocm)
    assert config_lib.for_inference(config, nvidia).model.attention == "cudnn"
    assert config_lib.for_inference(config, rocm).model.attention == "xla"
    assert config.model.attention == "cudnn"


TUPLES = {key: value for key, value in flatten(default()).items() if isinstance(value, tuple)}


def _parsed(*arguments):
    """What a binary makes of its flags."""
    values, command = flags.FlagValues(), ["binary", *arguments]
    config = config_flags.DEFINE_config_dict("config", default(), flag_values=values, sys_argv=command)
    values(command)
    validate(config.value)
    return flatten(config_lib.resolve(config.value, 1000))


def _forms(value):
    """Ways to write a tuple."""
    bare = [f"{element:g}" if isinstance(element, float) else str(element) for element in value]  # 1.0 as 1
    yield str(value)  # ('knn', 'retrieval')
    yield str(list(value))
    for separator in (",", ", "):
        text = separator.join(bare)  # knn,retrieval
        yield from (text, f"({text})", f"[{text}]", f" {text},")


@pytest.mark.parametrize("key", TUPLES)
def test_tuples_are_read_in_every_form(key):
    usual = TUPLES[key]
    other = usual[:1] * len(usual) if isinstance(usual[0], float) else usual[::-1]
    for form in _forms(usual):
        read = _parsed(f"--config.{key}={other}", f"--config.{key}", form)[key]  # the later flag wins
        assert (read, list(map(type, read))) == (usual, list(map(type, usual))), form
    for text in ("", "()", "some words", "5,,10", "5;10", "((1, 2), 3)"):
        with pytest.raises(ConfigError, match=rf"^{key} is \(.*; it must be"):
            _parsed(f"--config.{key}={text}")


def test_one_element_needs_no_comma():
    assert _parsed("--config.eval.knn_k=5")["eval.knn_k"] == (5,)
    assert _parsed("--config.eval.knn_k=(5)")["eval.knn_k"] == (5,)
    assert _parsed("--config.eval.protocols=knn")["eval.protocols"] == ("knn",)
    assert TupleParser().parse(("a", 1.5)) == ("a", 1.5)  # a default
