"""Checks of a configuration that need neither data nor devices; each error names value, rule and remedy."""

import difflib

from ml_collections import ConfigDict

from cmd_jax.config.keys import (
    BEST_METRICS,
    KEYS,
    METHODS,
    SOURCES,
    TFDS_PREFIX,
    flatten,
    has_class_token,
    is_swin,
    patch_px,
    token_px,
)
from cmd_jax.errors import ConfigError
from cmd_jax.models.sizes import DEFAULT_MODEL, SWIN_PATCH_PX, UNLEARNED, VIT, VIT_SIZES


def validate(config: ConfigDict) -> None:
    """Checks every value, by its own rule and beside the other values.

    Raises:
        ConfigError: naming the first key that breaks a rule.
    """
    check_values(config)
    _check_source("data.source", config.data.source, "data.folder", config.data.folder)
    if config.data.eval_source or config.data.eval_folder:
        _check_source("data.eval_source", config.data.eval_source or "folder", "data.eval_folder", config.data.eval_folder)
    for key, unit in _RANGES.items():
        low, high = flatten(config)[key]
        if low > high:
            raise ConfigError(f"{key} is ({low}, {high}); it needs low <= high, {unit}, for example {KEYS[key].default}")
    best = config.train.best_metric
    protocol = BEST_METRICS[best].protocol if best else None
    for key in ("protocols", "protocols_between") if protocol else ():
        if protocol not in config.eval[key]:
            raise ConfigError(
                f"train.best_metric is {best!r}, but eval.{key} is {tuple(config.eval[key])}; add {protocol!r} to it, or set "
                "train.best_metric to feature_std"
            )
    if config.model.attention == "cudnn" and config.model.dtype == "float32":
        raise ConfigError(
            "model.attention is 'cudnn', which takes no float32; pass --config.model.dtype=bfloat16 or "
            "--config.model.attention=xla"
        )
    if config.model.product_dtype == "float32" and config.model.dtype == "bfloat16":
        raise ConfigError(
            "model.product_dtype is 'float32' and model.dtype 'bfloat16'; a product has operands of the narrower one: leave "
            "model.product_dtype open, or pass --config.model.dtype=float32"
        )
    if config.init.weights == "":
        raise ConfigError(
            "init.weights is empty; pass --config.init.weights=SOURCE (a file, a directory, hf:OWNER/NAME or the workdir of a "
            "run), or choose a preset that starts from random weights"
        )
    if is_swin(config):
        _check_swin(config)
    else:
        _check_vit(config)
    _check_class_token(config)
    _check_mil(config)
    _check_shared_mlp(config)
    _check_masks(config)
    patch = patch_px(config)
    for key in ("views.global_px", "views.local_px", "eval.crop_px", "model.table_px"):
        side = flatten(config)[key]
        if side is not None and side % patch:
            near = " or ".join(str(count * patch) for count in (side // patch, side // patch + 1) if count)
            raise ConfigError(f"{key} is {side}; it must be a multiple of model.patch_size={patch}; use {near}")
    if config.eval.resize_px and config.eval.crop_px and config.eval.resize_px < config.eval.crop_px:
        raise ConfigError(
            f"eval.resize_px is {config.eval.resize_px}, less than eval.crop_px={config.eval.crop_px}; raise it to that"
        )
    warmup, epochs = config.optim.warmup_epochs, config.train.epochs
    if warmup is not None and epochs is not None and warmup > epochs:
        raise ConfigError(f"optim.warmup_epochs is {warmup}, longer than train.epochs={epochs}; use a tenth of the epochs")
    if config.train.batch_size is not None and config.train.batch_size % config.train.accumulate:
        raise ConfigError(
            f"train.accumulate is {config.train.accumulate}, which does not divide train.batch_size={config.train.batch_size}; "
            "use a divisor of it"
        )
    if all(weight == 0 for name, weight in config.method.items() if name.endswith("_weight") and name != "koleo_weight"):
        raise ConfigError("all weights of the objective are 0; set method.intra_image_weight or another above 0")


# Of two numbers, the first at most the second, with their unit.
_RANGES = {
    "views.global_scale": "a share",
    "views.local_scale": "a share",
    "views.blur_sigma": "in pixels",
    "method.mask_share": "a share",
}


def _check_swin(config: ConfigDict) -> None:
    """Refuses what a Swin does not have."""
    name = config.model.name
    if config.model.attention == "cudnn":
        raise ConfigError(f"model.attention is 'cudnn', but {name} adds a bias to its attention; set it to xla or choose a ViT")
    if patch_px(config) != SWIN_PATCH_PX:
        raise ConfigError(f"model.patch_size is {config.model.patch_size}, but a Swin's is {SWIN_PATCH_PX}; set it to that")
    for key in ("packed_views", "scan_blocks"):
        if config.model[key]:
            raise ConfigError(f"model.{key} is True, but {name} has blocks of several shapes; set it to False or choose a ViT")
    if config.model.num_heads:
        raise ConfigError(f"model.num_heads is {config.model.num_heads}, but {name} fixes the heads of its stages; leave it")
    for key in _OF_VITS:
        if config.model[key]:
            raise ConfigError(f"model.{key} is {config.model[key]!r}, but {name} is a Swin; leave it out, or choose a ViT")
    if config.init.freeze_blocks:
        raise ConfigError(
            f"init.freeze_blocks is {config.init.freeze_blocks}, but {name} is a Swin; set it to 0, or choose a ViT"
        )


# Of the section `model`, beside those that a Swin has too.
_OF_VITS = (
    "width", "depth", "mlp_dim", "registers", "class_token", "positions", "resample_rule", "rope_base", "layer_scale",
    "gated_mlp", "activation", "pre_norm", "qkv_bias",
)  # fmt: skip


def _check_vit(config: ConfigDict) -> None:
    """Refuses sizes and options of a ViT that do not go together."""
    model = config.model
    name = model.name or DEFAULT_MODEL
    size = VIT_SIZES.get(name) if model.name or not config.init.weights else None  # those may say another
    if size:
        for key in ("width", "depth"):
            if model[key] not in (None, getattr(size, key)):
                raise ConfigError(
                    f"model.{key} is {model[key]}, but that of model.name={name} is {getattr(size, key)}; leave it out, "
                    f"or set model.name={VIT}"
                )
    if model.name == VIT:
        for key in ("width", "depth", "num_heads"):
            if model[key] is None:
                raise ConfigError(f"model.name is {VIT!r}, of no size of its own; set model.{key}, for example 384, 12 or 6")
    width, heads = (
        model[key] or (size and getattr(size, other)) for key, other in (("width", "width"), ("num_heads", "heads"))
    )
    unit, what = (4, ", as positions rotary need") if model.positions == "rotary" else (1, "")
    if width and heads and (width % heads or (width // heads) % unit):
        raise ConfigError(
            f"model.num_heads is {heads}, and a width of {width} is not {heads} times a multiple of {unit}{what}; "
            "use another number of heads"
        )
    depth = model.depth or (size and size.depth)
    if depth and config.init.freeze_blocks > depth:
        raise ConfigError(f"init.freeze_blocks is {config.init.freeze_blocks}, but there are {depth} blocks; use at most that")
    if config.init.freeze_blocks and not config.init.weights:
        raise ConfigError(
            f"init.freeze_blocks is {config.init.freeze_blocks}, but without init.weights they are random; set it to 0, or "
            "init.weights"
        )
    if model.class_token is False and model.positions == "class_patches":
        raise ConfigError("model.positions is 'class_patches', but model.class_token is False; set it to patches")


def _check_class_token(config: ConfigDict) -> None:
    """Refuses what reads the class token where there is none."""
    if has_class_token(config):
        return
    name = config.model.name if is_swin(config) else "the model"
    pool = config.method.image_pool or METHODS[config.method.name]["image_pool"]
    if "cls" in pool.split("+"):
        others = "+".join(part for part in pool.split("+") if part != "cls") or "mean (or mil)"
        raise ConfigError(
            f"method.image_pool is {pool!r}, but {name} has no class token; "
            f"pass --config.method.image_pool={others}, or choose another model"
        )
    if "cls" in (config.eval.features or pool).split("+"):
        raise ConfigError(f"eval.features is {config.eval.features!r}, but {name} has no class token; use mean, mil or blocks")
    if config.method.mil_scorer == "class_token":
        raise ConfigError(
            f"method.mil_scorer is 'class_token', but {name} has no class token; set it to gated, or choose another model"
        )


def _check_mil(config: ConfigDict) -> None:
    """Refuses what the MIL scorer cannot do."""
    scorer, heads = config.method.mil_scorer, config.method.mil_heads
    if heads > 1 and scorer in UNLEARNED:
        raise ConfigError(
            f"method.mil_heads is {heads}, but method.mil_scorer {scorer!r} learns none; set it to 1, or the scorer to gated"
        )


def _check_shared_mlp(config: ConfigDict) -> None:
    """Refuses one head for images and patches that are not of one width."""
    method = METHODS[config.method.name]
    shared = method["share"] if config.head.share_mlp is None else config.head.share_mlp
    pool, scorer = config.method.image_pool or method["image_pool"], config.method.mil_scorer
    bags = pool == "mil" and (config.method.mil_heads > 1 or scorer == "class_token")
    if shared and (bags or "+" in pool):
        of = f" of several heads (method.mil_scorer={scorer})" if bags else ""
        raise ConfigError(
            f"head.share_mlp is True, but method.image_pool {pool!r}{of} is wider than a patch; "
            "set it to False, or method.image_pool to mean"
        )


def _check_masks(config: ConfigDict) -> None:
    """Refuses masked patches of views that have none to mask."""
    weight = config.method.intra_masked_weight
    if weight is None:
        weight = METHODS[config.method.name]["intra_masked"]
    if weight and config.views.global_px and config.views.global_px <= token_px(config):
        raise ConfigError(
            f"method.intra_masked_weight is {weight}, but a view of views.global_px={config.views.global_px} is one patch of "
            f"{token_px(config)} pixels, with no others to tell it from; set views.global_px to {2 * token_px(config)} or more"
        )


def _check_source(key: str, source: str, folder_key: str, folder: str | None) -> None:
    """Checks a source by its name, and its folder where it needs one."""
    if source == TFDS_PREFIX:
        raise ConfigError(f"{key} is {source!r}, without a name; use {TFDS_PREFIX}NAME, for example tfds:oxford_flowers102")
    if source not in SOURCES and not source.startswith(TFDS_PREFIX):
        raise ConfigError(f"{key} is {source!r}; it must be one of {', '.join(SOURCES)}, {TFDS_PREFIX}NAME")
    if source == "folder" and not folder:
        raise ConfigError(
            f"{key}=folder needs {folder_key}; pass --config.{folder_key}=DIR with train/CLASS/* or flat images in it"
        )


def check_values(config: ConfigDict) -> None:
    """Checks that a configuration has every key and no other, and each value by its own rule.

    Raises:
        ConfigError: naming the first key that breaks a rule.
    """
    given = flatten(config)
    for key in given:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            raise ConfigError(f"unknown config key {key}; {f'did you mean {near[0]}?' if near else 'see docs/configs.md'}")
    for key, (usual, rule, _) in KEYS.items():
        if key not in given:
            raise ConfigError(f"config key {key} is missing; set it, its default is {usual!r}")
        value = given[key]
        if not (value is None and usual is None) and not rule.accepts(value):
            raise ConfigError(f"{key} is {value!r}; it must be {rule.allowed}")
