"""Fills the open values of a configuration from its method, the data and the hardware; config.json."""

import json
import os
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from cmd_jax import files
from cmd_jax.config.keys import KEYS, METHODS, default, has_class_token, is_swin, patch_px, token_px
from cmd_jax.config.recipe import recipe
from cmd_jax.errors import ConfigError
from cmd_jax.method.chunk_size import default_chunk
from cmd_jax.models.sizes import DEFAULT_MODEL, SWIN_SIZES, VIT_SIZES

# Open values that a run learns with and that `resolve` takes from the hardware. A run that is continued keeps its own, whatever
# hardware it is continued on (training/resume.py).
BY_HARDWARE = ("model.dtype", "model.teacher_dtype", "model.product_dtype", "train.batch_size")

# Open values that follow the files beside `init.weights` (weights/read.py), kept in the same way.
BY_WEIGHTS = (
    "model.name",
    "model.width",
    "model.depth",
    "model.num_heads",
    "model.mlp_dim",
    "model.patch_size",
    "model.table_px",
    "model.window",
    "model.class_token",
    "model.registers",
    "model.positions",
    "model.resample_rule",
    "model.rope_base",
    "model.layer_scale",
    "model.gated_mlp",
    "model.activation",
    "model.pre_norm",
    "model.qkv_bias",
    "model.layer_norm_eps",
    "data.normalization",
    "views.global_px",
    "eval.resize_px",
    "eval.resize_mode",
    "eval.interpolation",
)

# Keys of earlier versions, whose config.json files and exports are still read.
RENAMED = {"mesh.fsdp": "mesh.shard_state"}

# Keys of earlier versions that are gone, with the value that meant what is done today.
REMOVED = {
    "mesh.model": 1,
    "method.inter_direction": "bag_to_image",
    "method.mil_entropy_weight": 0.0,
    "method.mil_warmup_epochs": 0.0,
    "method.relation_own_share": 0.5,
    "views.key_patch_share": 0.0,
}

# Below this many images the field uses fewer prototypes, a colder teacher and a faster EMA (see `resolve`).
SMALL_DATASET = 20_000

# Of an open train.batch_size. DINO trains with 64 images on each of 16 GPUs; with more in all its learning rate is untested.
IMAGES_PER_DEVICE = 64
MAX_BATCH_SIZE = 1024
MIN_STEPS_PER_EPOCH = 5
# What a step needs for an image, at most: of Swin-T at K = 65,536, in bfloat16 on a TPU, the compiler says 0.40 GiB
# (docs/performance.md); a ViT-S/16 needs less, a larger ViT as much more as it has channels, blocks and patches.
BYTES_PER_IMAGE = int(0.45 * 2**30)
VIT_S16 = 384 * 12 * 1072  # channels x blocks x patches of all views of an image at 224 px


class Hardware(NamedTuple):
    """What the open values of precision, batch and speed depend on.

    Attributes:
        platform: of the devices: "cpu", "gpu" or "tpu".
        devices: of all processes together.
        memory_bytes: of the device that has the least; None where it does not say.
        cuda: whether the devices are NVIDIA's; other GPUs are "gpu" too.
    """

    platform: str
    devices: int = 1
    memory_bytes: int | None = None
    cuda: bool = False


ONE_CPU = Hardware("cpu")


def default_batch_size(
    train_images: int, hardware: Hardware, accumulate: int = 1, bytes_per_image: int = BYTES_PER_IMAGE
) -> int:
    """The batch of all devices together where train.batch_size is open.

    On CPUs 64 images. On accelerators 64 for each device, or the power of two that its memory holds; at most 1,024, and no more
    than leaves five steps in an epoch unless that is fewer than 64.

    Args:
        train_images: number of training images; 0 where it is not known. The batch is not larger.
        hardware: that the run is on.
        accumulate: parts of the batch that go through one after the other. They make no batch larger, so that they save memory;
            devices x accumulate divides it.
        bytes_per_image: that a step takes on a device.
    """
    if hardware.platform == "cpu":
        batch = IMAGES_PER_DEVICE
    else:
        fits = hardware.memory_bytes // bytes_per_image if hardware.memory_bytes else IMAGES_PER_DEVICE
        on_device = min(IMAGES_PER_DEVICE, 2 ** (max(1, fits).bit_length() - 1))  # the power of two that fits
        batch = min(on_device * hardware.devices, MAX_BATCH_SIZE)
        if train_images:
            batch = min(batch, max(IMAGES_PER_DEVICE, train_images // MIN_STEPS_PER_EPOCH))
    if train_images:
        batch = min(batch, train_images)
    unit = hardware.devices * accumulate
    return max(1, batch // unit) * unit


def bytes_per_image(config: ConfigDict) -> int:
    """What a step takes for an image, roughly; frozen blocks keep nothing for a backward pass."""
    if is_swin(config):
        return BYTES_PER_IMAGE
    blocks = max(1, config.model.depth - config.init.freeze_blocks)
    return int(BYTES_PER_IMAGE * max(1.0, config.model.width * blocks * region_rows(config) / VIT_S16))


def method_values(name: str) -> dict[str, Any]:
    """The values, by key, that a method's name stands for where they are left open."""
    method = METHODS[name]
    return {
        "method.image_pool": method["image_pool"],
        "method.region_matching": method["region_matching"],
        "method.region_weights": method["region_weights"],
        "method.intra_image_weight": method["intra_image"],
        "method.intra_region_weight": method["intra_region"],
        "method.inter_student_weight": method["inter"],
        "method.inter_teacher_weight": method["inter"],
        "method.relation_weight": method["relation"],
        "method.released_weight": method["released"],
        "method.intra_masked_weight": method["intra_masked"],
        "head.share_mlp": method["share"],
        "head.share_prototypes": method["share"],
    }


def resolve(config: ConfigDict, train_images: int, hardware: Hardware = ONE_CPU) -> ConfigDict:
    """Fills every open value.

    Args:
        config: as given.
        train_images: number of training images.
        hardware: that the run is on; of the values that depend on it, those of BY_HARDWARE change what is learned.

    Returns:
        A copy without None among the learning values; frozen against unknown keys.
    """
    config = config.copy_and_resolve_references()
    _write_as_floats(config)
    _fill(config, "model.name", DEFAULT_MODEL)
    patch, small = patch_px(config), train_images < SMALL_DATASET
    _fill(config, "views.global_px", 224 // patch * patch)
    _fill(config, "views.local_px", max(1, round(config.views.global_px * 3 / 7 / patch)) * patch)
    if not is_swin(config):
        _fill_vit(config)
    rules: dict[str, Any] = {
        "model.patch_size": patch,
        "model.table_px": config.views.global_px,
        "model.window": 7,
        "model.registers": 0,
        "model.layer_norm_eps": 1e-6,
        "data.normalization": "imagenet",
        **method_values(config.method.name),
        "optim.lr": 5e-4,
        # Few images cannot fill 65,536 prototypes: most would never be the teacher's choice, and each costs memory.
        "head.prototypes": 4096 if small else 65_536,
        # With few prototypes and few images the teacher's distribution stays flat for long; a colder one sharpens it.
        "method.teacher_temp": 0.02 if small else 0.04,
        # Short runs: with 0.996 the teacher averages over 250 steps, a large share of all the steps there are.
        "method.teacher_momentum": 0.99 if small else 0.996,
        "eval.crop_px": config.views.global_px,
        "eval.resize_mode": "shorter_side",
        "eval.interpolation": "bicubic",
        **recipe(bool(config.init.weights), width_of(config), train_images, config.train.epochs),
    }
    for key, value in rules.items():
        _fill(config, key, value)
    _fill(config, "method.warmup_teacher_temp", config.method.teacher_temp)
    _fill(config, "eval.resize_px", round(config.eval.crop_px * 8 / 7))
    # The references read their own pool. For CMD what leave-one-out k-NN found best on the training images of the embedded data
    # (docs/results.md): with the class token's attention mil 77.4, beside cls+mean+mil 77.2, cls+mil 75.0, cls+mean 71.2, mean
    # 65.7, cls 57.8; with the gated scorer cls+mean+mil. A Swin has no class token, and was not measured.
    # From pretrained weights the class token is best before and after, by Rank-1 among the training images: of CMD continued on
    # birds cls 47.9, cls+mil 42.7, mil 27.7. L_N trains what it compares images by.
    best = "mil" if config.method.mil_scorer == "class_token" else "cls+mean+mil" if has_class_token(config) else "mean+mil"
    if config.init.weights and has_class_token(config):
        best = config.method.image_pool if config.method.relation_weight else "cls"
    _fill(
        config,
        "eval.features",
        best if "mil" in METHODS[config.method.name]["image_pool"].split("+") else config.method.image_pool,
    )
    _fill(config, "model.dtype", "float32" if hardware.platform == "cpu" else "bfloat16")
    _fill(config, "model.teacher_dtype", config.model.dtype)
    _fill(config, "model.product_dtype", config.model.dtype)
    _fill(
        config,
        "train.batch_size",
        default_batch_size(train_images, hardware, config.train.accumulate, bytes_per_image(config)),
    )
    is_vit, cpu = not is_swin(config), hardware.platform == "cpu"
    images = -(-config.train.batch_size // (hardware.devices * config.train.accumulate))  # at a time on a device
    chunk = default_chunk(region_rows(config) * images, config.head.prototypes, hardware.platform, hardware.memory_bytes)
    _fill(config, "method.prototype_chunk", chunk)
    # On a CPU, the sign of a problem that is large for its memory; tiles then stay in the cache.
    chunked = cpu and config.method.prototype_chunk < config.head.prototypes
    _fill(config, "method.matched_targets", "gathered" if chunked else "expected")
    _fill(config, "model.packed_views", is_vit and hardware.platform != "tpu")
    _fill(config, "model.remat", "dots" if is_vit and chunked else "none")
    _fill(config, "model.scan_blocks", is_vit and (cpu or config.model.remat != "none"))
    _fill(config, "model.attention", "cudnn" if hardware.cuda and is_vit and config.model.dtype == "bfloat16" else "xla")
    config.lock()
    return config


def width_of(config: ConfigDict) -> int:
    """Channels of the backbone's last block."""
    return 8 * SWIN_SIZES[config.model.name].width if is_swin(config) else config.model.width


def _fill_vit(config: ConfigDict) -> None:
    """Fills size and options of a ViT."""
    size = VIT_SIZES.get(config.model.name)
    if size:
        _fill(config, "model.width", size.width)
        _fill(config, "model.depth", size.depth)
        _fill(config, "model.num_heads", size.heads)
    rules = {
        "model.mlp_dim": 4 * config.model.width,
        "model.class_token": True,
        "model.positions": "patches" if config.model.class_token is False else "class_patches",
        "model.resample_rule": "dino",
        "model.rope_base": 100.0,
        "model.layer_scale": False,
        "model.gated_mlp": False,
        "model.activation": "gelu",
        "model.pre_norm": False,
        "model.qkv_bias": "qkv",
    }
    for key, value in rules.items():
        _fill(config, key, value)


def check_attention(config: ConfigDict, hardware: Hardware) -> None:
    """Checks that the attention of a resolved configuration can be computed on the hardware of its run.

    Raises:
        ConfigError: it cannot.
    """
    if config.model.attention == "cudnn" and not hardware.cuda:
        raise ConfigError(
            f"model.attention is 'cudnn', which needs NVIDIA GPUs, but the devices are {hardware.platform}; pass "
            "--config.model.attention=xla or leave it out"
        )


def for_inference(config: ConfigDict, hardware: Hardware) -> ConfigDict:
    """A run's resolved configuration, changed to what computes the same on the hardware at hand: XLA's attention where that of
    cuDNN is missing."""
    config = config.copy_and_resolve_references()
    if config.model.attention == "cudnn" and not hardware.cuda:
        config.model.attention = "xla"
    return config


def start_name(config: ConfigDict) -> str:
    """What a run starts from, in words."""
    return f"weights of {config.init.weights}" if config.init.weights else "random weights"


def region_rows(config: ConfigDict) -> int:
    """Patches of all views of one image, student's and teacher's: the rows of the objective's logits."""
    patches = lambda side: (-(-side // token_px(config))) ** 2
    return 4 * patches(config.views.global_px) + config.views.local_count * patches(config.views.local_px)


def _write_as_floats(config: ConfigDict) -> None:
    """Writes the numbers of a tuple as floats where its default has floats; ConfigDict does so for a single number."""
    for key, (usual, _, _) in KEYS.items():
        if isinstance(usual, tuple) and isinstance(usual[0], float):
            section, name = key.split(".")
            config[section][name] = tuple(map(float, config[section][name]))


def _fill(config: ConfigDict, key: str, value: Any) -> None:
    section, name = key.split(".")
    if config[section][name] is None:
        config[section][name] = value


def absolute_paths(config: ConfigDict) -> ConfigDict:
    """The configuration with local paths of the section `data` that mean the same from any directory.

    A leading ~ is expanded in the folders of images. It stays in the other keys: `data_dir` is everyone's own by default.
    """
    config = config.copy_and_resolve_references()
    for key in ("folder", "eval_folder", "data_dir", "manual_dir", "cache_dir"):
        path = config.data[key]
        if path and not files.is_remote(path):
            path = os.path.expanduser(path) if key.endswith("folder") else path
            config.data[key] = path if path.startswith("~") else os.path.abspath(path)
    return config


def save(config: ConfigDict, path: str) -> None:
    """Writes the resolved configuration as JSON, whole or not at all."""
    files.write(path, json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")


def load(path: str) -> ConfigDict:
    """Reads a configuration that `save` wrote; keys that it lacks get their default.

    Raises:
        ConfigError: the file is not a configuration.
    """
    return from_dict(read_json(path))


def from_dict(stored: dict[str, Any]) -> ConfigDict:
    """A configuration from its values by section; keys that it lacks get their default, unknown ones are kept.

    Raises:
        ConfigError, ValueError, TypeError or another: a section is no mapping, or a key is gone.
    """
    config = default()
    with config.unlocked(), config.ignore_type():
        config.update(_current(stored))
    config.lock()
    return config


def read_json(path: str) -> dict[str, Any]:
    """The values of a config.json by section, under the keys of today.

    Raises:
        ConfigError: the file is not a configuration.
    """
    try:
        stored = json.loads(files.read(path))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); restore it, or give another --workdir") from error
    if not isinstance(stored, dict):
        raise ConfigError(f"{path} is not a configuration but a {type(stored).__name__}; restore it, or give another --workdir")
    return _current(stored)


def _current(stored: dict[str, Any]) -> dict[str, Any]:
    """The values of an earlier version under the keys of today."""
    stored = {section: dict(values) if isinstance(values, dict) else values for section, values in stored.items()}
    for old, new in (RENAMED | REMOVED).items():
        section, name = old.split(".")
        values = stored.get(section)
        if not isinstance(values, dict) or name not in values:
            continue
        value = values.pop(name)
        if old in RENAMED:
            values[new.split(".")[1]] = value
        elif value != new:
            raise ConfigError(f"{old} is {value!r}, but this key is gone; only runs with {old}={new} can be read")
    return stored
