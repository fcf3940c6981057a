"""Checks of a configuration, each with a remedy: everything that can be checked without data or devices."""

from typing import Any

from ml_collections import ConfigDict

from cmd_jax.config import BEST_METRICS, METHODS, MODELS, SOURCES, TFDS_PREFIX, ConfigError, is_swin, patch_px
from cmd_jax.models import swin


def validate(config: ConfigDict) -> None:
    """Checks every value that can be checked without data or devices.

    Raises:
        ConfigError: naming the first key that breaks a rule.
    """
    _choice("method.name", config.method.name, METHODS)
    _choice("method.image_pool", config.method.image_pool, ("mil", "cls", "mean", None))
    _choice("method.region_weights", config.method.region_weights, ("teacher_mil", "uniform", None))
    _choice("method.centering", config.method.centering, ("ema", "sinkhorn"))
    _choice("method.matched_targets", config.method.matched_targets, ("expected", "gathered", None))
    _choice("model.name", config.model.name, MODELS)
    _choice("model.dtype", config.model.dtype, ("float32", "bfloat16"))
    _choice("model.teacher_dtype", config.model.teacher_dtype, ("float32", "bfloat16", None))
    _choice("model.attention", config.model.attention, ("xla", "cudnn", None))
    _choice("model.remat", config.model.remat, ("none", "dots", "full", None))
    if config.model.attention == "cudnn" and config.model.dtype == "float32":
        raise ConfigError(
            "model.attention is 'cudnn', which takes no float32; pass --config.model.dtype=bfloat16 or "
            "--config.model.attention=xla"
        )
    _choice("train.best_metric", config.train.best_metric, (*BEST_METRICS, None))
    _choice("init.network", config.init.network, ("teacher", "student"))
    _data_source("data.source", config.data.source, "data.folder", config.data.folder)
    if config.data.eval_source or config.data.eval_folder:
        _data_source("data.eval_source", config.data.eval_source or "folder", "data.eval_folder", config.data.eval_folder)
    _choice("data.normalization", config.data.normalization, ("imagenet", "local_contrast"))
    _choice("views.dtype", config.views.dtype, ("float32", "bfloat16"))
    _choice("data.cache", config.data.cache, ("auto", "ram", "disk", "none"))
    for key in [
        "head.prototypes",
        "head.hidden_dim",
        "head.bottleneck_dim",
        "head.layers",
        "method.mil_hidden_dim",
        "method.prototype_chunk",
        "model.patch_size",
        "model.window",
        "data.canvas_px",
        "data.decode_threads",
        "data.prefetch_batches",
        "views.global_px",
        "views.local_px",
        "train.batch_size",
        "train.accumulate",
        "mesh.model",
        "method.momentum_batch_size",
        "train.log_every_steps",
        "train.keep_checkpoints",
        "eval.batch_size",
        "eval.resize_px",
        "eval.crop_px",
        "eval.last_blocks",
    ]:
        _range(config, key, low=1)
    for key in [
        "method.intra_image_weight",
        "method.intra_region_weight",
        "method.inter_student_weight",
        "method.inter_teacher_weight",
        "method.released_weight",
        "method.koleo_weight",
        "method.warmup_teacher_temp_epochs",
        "model.registers",
        "views.local_count",
        "views.brightness",
        "views.contrast",
        "views.saturation",
        "optim.min_lr",
        "optim.warmup_epochs",
        "optim.weight_decay",
        "optim.weight_decay_end",
        "optim.clip_grad",
        "optim.freeze_last_layer_epochs",
        "eval.every_epochs",
    ]:
        _range(config, key, low=0)
    for key in [
        "method.teacher_momentum",
        "method.teacher_momentum_end",
        "method.center_momentum",
        "views.jitter_prob",
        "views.grayscale_prob",
        "views.local_blur_prob",
    ]:
        _range(config, key, low=0, high=1)
    _range(config, "views.hue", low=0, high=0.5)
    for key in [
        "method.student_temp",
        "method.teacher_temp",
        "method.warmup_teacher_temp",
        "method.mil_temp",
        "optim.lr",
        "train.epochs",
        "train.checkpoint_every_epochs",
        "eval.knn_temp",
    ]:
        _range(config, key, low=0, open_low=True)
    _range(config, "model.drop_path", low=0, high=0.99)
    for key in ("views.global_scale", "views.local_scale"):
        section, name = key.split(".")
        low, high = config[section][name]
        if not 0 < low <= high <= 1:
            raise ConfigError(
                f"{key} is ({low}, {high}); it needs 0 < low <= high <= 1, a share of the image's area, for example (0.4, 1.0)"
            )
    for name in (config.eval.features or "mil").split("+"):
        _choice("eval.features", name, ("cls", "mean", "mil", "blocks"))
    _check_backbone(config)
    for key in ("views.global_px", "views.local_px", "eval.crop_px"):
        section, name = key.split(".")
        side, patch = config[section][name], patch_px(config)
        if side is not None and side % patch:
            near = " or ".join(str(count * patch) for count in (side // patch, side // patch + 1) if count)
            raise ConfigError(f"{key} is {side}; it must be a multiple of model.patch_size={patch}; use {near}")
    if config.eval.resize_px and config.eval.crop_px and config.eval.resize_px < config.eval.crop_px:
        raise ConfigError(
            f"eval.resize_px is {config.eval.resize_px}, less than eval.crop_px={config.eval.crop_px}; raise it to that"
        )
    if config.optim.warmup_epochs > config.train.epochs:
        raise ConfigError(
            f"optim.warmup_epochs is {config.optim.warmup_epochs}, longer than train.epochs={config.train.epochs}; "
            "use a tenth of the epochs"
        )
    if config.mesh.data != -1:
        _range(config, "mesh.data", low=1)
    if config.train.batch_size % config.train.accumulate:
        raise ConfigError(
            f"train.accumulate is {config.train.accumulate}, which does not divide train.batch_size={config.train.batch_size}; "
            "use a divisor of it"
        )
    released = METHODS[config.method.name].get("released", 0.0)
    if config.mesh.model > 1 and (config.method.released_weight if config.method.released_weight is not None else released):
        raise ConfigError(
            f"mesh.model is {config.mesh.model}, but the released term needs all prototypes on every device; use 1"
        )
    terms = ("intra_image", "intra_region", "inter_student", "inter_teacher", "released")
    if all(config.method[f"{term}_weight"] == 0 for term in terms):
        raise ConfigError("all weights of the objective are 0; set method.intra_image_weight or another above 0")


def _check_backbone(config: ConfigDict) -> None:
    """What a ViT has and a Swin has not."""
    if not is_swin(config):
        return
    name = config.model.name
    if config.model.attention == "cudnn":
        raise ConfigError(f"model.attention is 'cudnn', but {name} adds a bias to its attention; set it to xla or choose a ViT")
    if patch_px(config) != swin.PATCH_PX:
        raise ConfigError(f"model.patch_size is {config.model.patch_size}, but a Swin's is {swin.PATCH_PX}; set it to that")
    for key in ("packed_views", "scan_blocks"):
        if config.model[key]:
            raise ConfigError(f"model.{key} is True, but {name} has blocks of several shapes; set it to False or choose a ViT")
    if config.model.registers:
        raise ConfigError(f"model.registers is {config.model.registers}, but {name} has none; set it to 0 or choose a ViT")
    pool = config.method.image_pool or METHODS[config.method.name]["image_pool"]
    if pool == "cls":
        raise ConfigError(
            f"method.image_pool is 'cls', but {name} has no class token; "
            "pass --config.method.image_pool=mean (or mil), or choose a ViT"
        )
    if "cls" in (config.eval.features or pool).split("+"):
        raise ConfigError(f"eval.features is {config.eval.features!r}, but {name} has no class token; use mean, mil or blocks")


def _data_source(key: str, source: str, folder_key: str, folder: str | None) -> None:
    """A source by name, with its folder where it needs one."""
    if source.startswith(TFDS_PREFIX):
        if source == TFDS_PREFIX:
            raise ConfigError(f"{key} is {source!r}, without a name; use {TFDS_PREFIX}NAME, for example tfds:oxford_flowers102")
        return
    _choice(key, source, (*SOURCES, f"{TFDS_PREFIX}NAME"))
    if source == "folder" and not folder:
        raise ConfigError(
            f"{key}=folder needs {folder_key}; pass --config.{folder_key}=DIR with train/CLASS/* or flat images in it"
        )


def _choice(key: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise ConfigError(
            f"{key} is {value!r}; choose one of {', '.join(str(choice) for choice in choices if choice is not None)}"
        )


def _range(config: ConfigDict, key: str, low: float, high: float | None = None, open_low: bool = False) -> None:
    section, name = key.split(".")
    value = config[section][name]
    if value is None:
        return
    if value < low or (open_low and value == low) or (high is not None and value > high):
        rule = f"{'above' if open_low else 'at least'} {low}" + (f" and at most {high}" if high is not None else "")
        raise ConfigError(f"{key} is {value}; it must be {rule}")
