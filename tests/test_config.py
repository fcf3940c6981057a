"""Rules that fill open values, and errors that name key, value, rule and remedy."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from cmd_jax import config as config_lib
from cmd_jax import presets
from cmd_jax.config import default
from cmd_jax.errors import ConfigError
from cmd_jax.hardware import Hardware
from cmd_jax.rules import RULES, keys
from cmd_jax.training.sharding import check_mesh
from cmd_jax.validation import validate

CONFIGS = Path(__file__).parent.parent / "configs"
FINE_GRAINED = ("", *presets.PRESETS)
PRESETS = {
    "demo": ("", "paper_objective", "smoke"),
    "folder": ("", "small", "small_paper_objective", "paper"),
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


@pytest.mark.parametrize(("name", "preset"), [(name, preset) for name, presets in PRESETS.items() for preset in presets])
def test_every_preset_is_valid_before_and_after_it_is_resolved(name, preset):
    config = _file(name).get_config(preset)
    if config.data.source == "folder":
        config.data.folder = "photos"
    validate(config)
    resolved = config_lib.resolve(config, 5994)
    validate(resolved)
    json.dumps(resolved.to_dict())
    assert _file(name).__doc__.count("python -m cmd_jax.main") >= 1


def test_the_presets_of_the_references_have_their_values():
    resolved = {name: config_lib.resolve(_file("cub").get_config(name), 5994) for name in FINE_GRAINED if name != "small"}
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


def test_the_recipe_of_the_paper_does_not_depend_on_the_size_of_the_data():
    of_size = {images: config_lib.resolve(_file("cub").get_config("paper"), images) for images in (100, 100_000)}
    assert of_size[100].to_dict() == of_size[100_000].to_dict()
    own = config_lib.resolve(_file("folder").get_config("paper"), 100).to_dict()
    assert {key for key, value in own.items() if value != of_size[100].to_dict()[key]} == {"data"}


@pytest.mark.parametrize("name", PRESETS)
def test_an_unknown_preset_is_refused(name):
    with pytest.raises(ConfigError, match="no preset 'typo'"):
        _file(name).get_config("typo")


def test_small_data_gets_fewer_prototypes_a_colder_teacher_and_a_faster_ema():
    small, large = (config_lib.resolve(default(), count) for count in (5994, 50_000))
    assert small.head.prototypes < large.head.prototypes == 65_536
    assert small.method.teacher_temp < large.method.teacher_temp == 0.04
    assert small.method.teacher_momentum < large.method.teacher_momentum == 0.996


def test_the_start_of_a_run_has_a_name():
    config = default()
    assert config_lib.start_name(config) == "random weights"
    config.init.weights = "hf:facebook/dino-vits16"
    assert config_lib.start_name(config) == "weights of hf:facebook/dino-vits16"


@pytest.mark.parametrize("name", config_lib.METHODS)
def test_a_method_fills_what_is_open_and_leaves_what_is_set(name):
    config = default()
    config.method.name = name
    resolved = config_lib.resolve(config, 1000).method
    expected = {
        "cmd": (0.5, 0.5, 1.0, 1.0, 0.0),
        "cmd_bag": (1.0, 1.0, 0.0, 0.0, 0.0),
        "esvit": (0.5, 0.5, 0.0, 0.0, 0.0),
        "released": (0.5, 0.5, 0.0, 0.0, 1.0),
        "dino": (1.0, 0.0, 0.0, 0.0, 0.0),
    }[name]
    terms = ("intra_image", "intra_region", "inter_student", "inter_teacher", "released")
    assert tuple(resolved[f"{term}_weight"] for term in terms) == expected
    config.method.inter_student_weight = 0.25
    assert config_lib.resolve(config, 1000).method.inter_student_weight == 0.25


@pytest.mark.parametrize("name", ["dino", "esvit"])
def test_the_references_are_evaluated_with_the_pool_they_are_trained_with(name):
    config = default()
    config.method.name = name
    assert config_lib.resolve(config, 1000).eval.features == {"dino": "cls", "esvit": "mean"}[name]
    config.method.image_pool = "cls+mean"
    validate(config)
    resolved = config_lib.resolve(config, 1000)
    assert resolved.eval.features == "cls+mean"
    validate(resolved)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method.name", "moco", "method.name is 'moco'; choose one of cmd, cmd_bag, esvit, released, dino"),
        ("model.name", "vit_huge", "model.name is 'vit_huge'; choose one of vit_micro"),
        ("data.source", "imagenet", "data.source is 'imagenet'; choose one of synthetic_birds, .*, tfds:NAME"),
        ("data.source", "tfds:", "data.source is 'tfds:', without a name; use tfds:NAME"),
        ("data.eval_source", "folder", "data.eval_source=folder needs data.eval_folder; pass --config.data.eval_folder=DIR"),
        ("data.eval_source", "birds", "data.eval_source is 'birds'; choose one of"),
        ("data.source", "folder", "needs data.folder; pass --config.data.folder"),
        ("train.batch_size", 0, "train.batch_size is 0; it must be at least 1"),
        ("optim.lr", 0.0, "optim.lr is 0.0; it must be above 0"),
        ("views.jitter_prob", 1.5, "views.jitter_prob is 1.5; it must be at least 0 and at most 1"),
        ("views.hue", 0.6, "views.hue is 0.6"),
        ("views.local_scale", (0.4, 0.1), r"views.local_scale is \(0.4, 0.1\)"),
        ("views.global_px", 220, "views.global_px is 220; it must be a multiple of model.patch_size=16; use 208 or 224"),
        ("views.local_px", 8, "views.local_px is 8; .* use 16$"),
        ("eval.features", "cls+foo", "eval.features is 'foo'"),
        ("optim.warmup_epochs", 200.0, "longer than train.epochs=100.0"),
        ("method.mil_warmup_epochs", 200.0, "method.mil_warmup_epochs is 200.0, longer than train.epochs=100.0; use a tenth"),
    ],
)
def test_a_bad_value_is_named_with_its_rule_and_remedy(key, value, message):
    config = default()
    section, name = key.split(".")
    config[section][name] = value
    with pytest.raises(ConfigError, match=message):
        validate(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method.name": "dino"}, "method.image_pool is 'cls', but swin_tiny has no class token; pass --config.method.image"),
        ({"method.image_pool": "cls"}, "method.image_pool is 'cls'"),
        (
            {"method.image_pool": "mean+cls+mil"},
            r"image_pool is 'mean\+cls\+mil', but swin_tiny has no class token; pass --config.method.image_pool=mean\+mil,",
        ),
        ({"eval.features": "mil+cls"}, r"eval.features is 'mil\+cls', but swin_tiny has no class token; use mean"),
        ({"model.patch_size": 16}, "model.patch_size is 16, but a Swin's is 4; set it to that"),
        ({"model.patch_size": 8, "views.local_px": 92}, "model.patch_size is 8, but a Swin's is 4"),
        ({"model.registers": 4}, "model.registers is 4, but swin_tiny has none"),
        ({"views.local_px": 98}, "views.local_px is 98; it must be a multiple of model.patch_size=4; use 96 or 100"),
        ({"model.window": 0}, "model.window is 0; it must be at least 1"),
    ],
)
def test_what_a_swin_has_not_is_refused_with_the_remedy(values, message):
    config = default()
    config.model.name = "swin_tiny"
    validate(config)
    assert config_lib.resolve(config, 1000).model.patch_size == 4
    for key, value in values.items():
        section, name = key.split(".")
        config[section][name] = value
    with pytest.raises(ConfigError, match=message):
        validate(config)


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


@pytest.mark.parametrize("key", sorted(keys(default())))
def test_every_key_refuses_every_kind_of_bad_value(key):
    *section, name = key.split(".")
    usual = keys(default())[key]
    kind = (default()[section[0]] if section else default()).get_type(name).__name__
    refused = BAD_VALUES[kind] + ([] if usual is None else [None])
    if key in ("eval.knn_k", "eval.fractions", "eval.linear_lrs"):  # of any length
        refused.remove((1.0,) * 3)
    if key == "method.mil_entropy_weight":  # of either sign
        refused.remove(-1.0)
    for value in refused:
        config = default()
        config.data.source = "cub"
        _set(config, key, value)
        with pytest.raises(ConfigError) as caught:
            validate(config)
        message = str(caught.value)
        assert message.startswith(f"{key} is {value!r}"), message
        assert ";" in message, message


def test_every_key_has_a_rule_and_every_rule_a_key():
    assert set(RULES) == set(keys(default()))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("eval.knn_k", (), "eval.knn_k is (); it must be one or more numbers, each a whole number"),
        ("eval.knn_k", (10, 0), "eval.knn_k is (10, 0); it must be one or more numbers, each at least 1 and at most 1,000,000"),
        (
            "views.global_blur_prob",
            (1.0,),
            "views.global_blur_prob is (1.0,); it must be 2 numbers, each at least 0 and at most 1",
        ),
        ("optim.lr", float("nan"), "optim.lr is nan; it must be above 0 and at most 100"),
        ("train.batch_size", 10**9, "train.batch_size is 1000000000; it must be at least 1 and at most 1,048,576"),
        ("train.batch_size", "64", "train.batch_size is '64'; it must be a whole number"),
        ("mesh.data", 0, "mesh.data is 0; it must be -1, or at least 1 and at most 1,048,576"),
        ("views.blur_sigma", (2.0, 0.1), "views.blur_sigma is (2.0, 0.1); it needs low <= high, in pixels"),
        ("init.heads", "no", "init.heads is 'no'; it must be True or False"),
        ("data.data_dir", "", "data.data_dir is ''; it must be text that is not empty"),
        (
            "method.image_pool",
            "cls+max",
            "method.image_pool is 'cls+max'; choose one of mil, cls, mean, or several like cls+mean, each once",
        ),
        ("method.image_pool", "mil+mil", "method.image_pool is 'mil+mil'; choose one of mil"),
        ("optim.lrr", 1.0, "optim.lrr is no key of the configuration; did you mean optim.lr?"),
        ("colour", 1.0, "colour is no key of the configuration; cmd_jax/config.py has them all"),
    ],
)
def test_the_rule_stands_beside_the_value(key, value, message):
    config = default()
    _set(config, key, value)
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(config)


def test_a_missing_key_is_named():
    config = default()
    del config.optim["lr"]
    with pytest.raises(ConfigError, match=r"optim\.lr is missing; set it, usual is 0\.0005"):
        validate(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method.mil_scorer": "max"}, "method.mil_scorer is 'max'; choose one of gated, attention, class_token, mean"),
        (
            {"method.mil_scorer": "class_token", "model.name": "swin_tiny", "method.image_pool": "mil"},
            "method.mil_scorer is 'class_token', but swin_tiny has no class token; set it to gated, or choose a ViT",
        ),
        (
            {"method.mil_scorer": "mean", "method.mil_heads": 4},
            "method.mil_heads is 4, but method.mil_scorer 'mean' learns none; set it to 1, or the scorer to gated",
        ),
        (
            {"method.mil_scorer": "mean", "method.mil_entropy_weight": 0.1},
            "method.mil_entropy_weight is 0.1, but method.mil_scorer is 'mean', whose weights do not change; set it to 0 or",
        ),
        (
            {"views.global_px": 16, "views.local_px": 16, "method.mil_entropy_weight": -0.1},
            "method.mil_entropy_weight is -0.1, but a view of views.global_px=16 is one patch of 16 pixels, whose weight is 1;"
            " set it to 0 or views.global_px to 32 or more",
        ),
    ],
)
def test_what_the_mil_weights_cannot_do_is_refused(values, message):
    config = default()
    config.update_from_flattened_dict(values)
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(config)


def test_an_objective_without_terms_is_refused():
    config = default()
    for term in ("intra_image", "intra_region", "inter_student", "inter_teacher", "released"):
        config.method[f"{term}_weight"] = 0.0
    with pytest.raises(ConfigError, match="all weights"):
        validate(config)


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
def test_precision_and_batch_that_are_left_open_follow_the_hardware(hardware, images, options, dtype, batch):
    config = default()
    config.update_from_flattened_dict(options)
    resolved = config_lib.resolve(config, images, hardware)
    assert (resolved.model.dtype, resolved.model.teacher_dtype, resolved.train.batch_size) == (dtype, dtype, batch)
    check_mesh(resolved, hardware.devices)


def test_keys_of_earlier_versions_are_read(tmp_path):
    stored = config_lib.resolve(default(), 1000).to_dict()
    del stored["mesh"]["shard_state"]
    stored["mesh"]["fsdp"] = True
    path = tmp_path / "config.json"
    path.write_text(json.dumps(stored))
    for config in (config_lib.load(str(path)), config_lib.from_dict(stored)):
        validate(config)
        assert config.mesh.shard_state is True
    assert "fsdp" not in config_lib.read_json(str(path))["mesh"]


def test_open_values_of_speed_follow_the_hardware():
    def resolved(platform, cuda=False, **options):
        config = default()
        config.update_from_flattened_dict(options)
        config = config_lib.resolve(config, 100_000, Hardware(platform, memory_bytes=80 * 2**30, cuda=cuda))
        keys = ("packed_views", "scan_blocks", "remat", "attention")
        return [config.model[key] for key in keys] + [config.method.prototype_chunk, config.method.matched_targets]

    assert resolved("cpu") == [True, True, "dots", "xla", 256, "gathered"]
    small = {"train.batch_size": 4, "head.prototypes": 4096}
    assert resolved("cpu", **small) == [True, True, "none", "xla", 4096, "expected"]
    assert resolved("gpu", cuda=True) == [True, False, "none", "cudnn", 8192, "expected"]
    assert resolved("gpu", cuda=True, **{"model.dtype": "float32"})[3] == "xla"
    assert resolved("gpu")[3] == "xla"  # ROCm
    assert resolved("tpu") == [False, False, "none", "xla", 256, "expected"]
    assert resolved("gpu", **{"model.name": "swin_tiny"})[:3] == [False, False, "none"]
    assert resolved("gpu", **{"model.remat": "full"})[1]


def test_fused_attention_needs_nvidia_gpus_to_train_and_is_replaced_elsewhere_to_evaluate():
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.attention": "cudnn", "model.dtype": "float32"}, "takes no float32"),
        ({"model.attention": "cudnn", "model.dtype": "bfloat16", "model.name": "swin_tiny"}, "adds a bias"),
        ({"model.name": "swin_tiny", "model.packed_views": True}, "model.packed_views is True"),
        ({"model.remat": "all"}, "model.remat is 'all'; choose one of none, dots, full"),
        ({"method.matched_targets": "sorted"}, "method.matched_targets is 'sorted'"),
        ({"method.prototype_chunk": 0}, "method.prototype_chunk is 0"),
    ],
)
def test_speed_options_that_cannot_work_are_refused(changes, message):
    config = default()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message):
        validate(config)
