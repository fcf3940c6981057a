"""What each value of the configuration may be, taken by itself; `validation` adds what values mean for one another."""

import difflib
import math
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from cmd_jax import normalization
from cmd_jax.config import BEST_METRICS, EVAL_PROTOCOLS, METHODS, MODELS, default
from cmd_jax.errors import ConfigError


class Whole(NamedTuple):
    """A whole number within bounds; the upper ones are beyond any use, to stop a slip before it takes all memory."""

    low: int
    high: int
    also: int | None = None  # a number outside that stands for something else

    def broken(self, value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int):
            return "a whole number"
        if self.low <= value <= self.high or value == self.also:
            return None
        return f"{'' if self.also is None else f'{self.also}, or '}at least {self.low} and at most {self.high:,}"


class Number(NamedTuple):
    """A finite number within bounds."""

    low: float
    high: float
    open_low: bool = False  # `low` itself is out

    def broken(self, value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "a number"
        if self.low <= value <= self.high and not (self.open_low and value == self.low):  # NaN is in no bounds
            return None
        return f"{'above' if self.open_low else 'at least'} {self.low:g} and at most {self.high:g}"


class Flag(NamedTuple):
    """True or False."""

    def broken(self, value: Any) -> str | None:
        return None if isinstance(value, bool) else "True or False"


class Text(NamedTuple):
    """A path or a name."""

    may_be_empty: bool = True

    def broken(self, value: Any) -> str | None:
        if not isinstance(value, str) or not (value or self.may_be_empty):
            return "text" if self.may_be_empty else "text that is not empty"
        return "text without a null character" if "\0" in value else None


class Choice(NamedTuple):
    """One of several words."""

    words: tuple[str, ...]

    def broken(self, value: Any) -> str | None:
        return None if value in self.words else ", ".join(self.words)


class Normalization(NamedTuple):
    """A word, or mean and standard deviation of the three channels."""

    words: tuple[str, ...]

    def broken(self, value: Any) -> str | None:
        try:
            normalization.statistics_of(value)
        except (ValueError, AttributeError):
            return f"{', '.join(self.words)}, or MEAN/STD of the three channels in 0..1, such as 0.5,0.5,0.5/0.5,0.5,0.5"
        return None


class Joined(NamedTuple):
    """One of several words, or some of them joined by "+", each once."""

    words: tuple[str, ...]

    def broken(self, value: Any) -> str | None:
        parts = value.split("+") if isinstance(value, str) else [None]
        if set(parts) <= set(self.words) and len(set(parts)) == len(parts):
            return None
        return f"{', '.join(self.words)}, or several like {'+'.join(self.words[1:])}, each once"


class Several(NamedTuple):
    """A tuple of numbers, of a given length or, with None, of at least one."""

    of: Whole | Number
    length: int | None

    def broken(self, value: Any) -> str | None:
        count = f"{self.length} numbers" if self.length else "one or more numbers"
        if not isinstance(value, tuple | list) or len(value) != (self.length or max(1, len(value))):
            return f"{count}, each {self.of.broken(math.nan)}"
        reasons = [reason for reason in map(self.of.broken, value) if reason]
        return f"{count}, each {reasons[0]}" if reasons else None


class Words(NamedTuple):
    """A tuple of one or more of several words, each once."""

    words: tuple[str, ...]

    def broken(self, value: Any) -> str | None:
        good = isinstance(value, tuple | list) and value and all(isinstance(word, str) and word in self.words for word in value)
        return None if good and len(set(value)) == len(value) else f"one or more of {', '.join(self.words)}, each once"


Rule = Whole | Number | Flag | Text | Choice | Normalization | Joined | Several | Words

SHARE = Number(0, 1)
DTYPE = Choice(("float32", "bfloat16"))
WEIGHT = Number(0, 1e6)
TEMPERATURE = Number(0, 100, open_low=True)
EPOCHS = Number(0, 1e6)
SOME_EPOCHS = EPOCHS._replace(open_low=True)
SIDE_PX = Whole(1, 16_384)
WIDTH = Whole(1, 2**16)
IMAGES = Whole(1, 2**20)  # of a batch

RULES: dict[str, Rule] = {
    "seed": Whole(0, 2**32 - 1),  # JAX takes the lower 32 bits: two seeds beyond would be the same run
    "method.name": Choice(tuple(METHODS)),
    "method.image_pool": Joined(("mil", "cls", "mean")),
    "method.region_matching": Choice(("similarity", "location")),
    "method.region_weights": Choice(("teacher_mil", "uniform")),
    "method.intra_image_weight": WEIGHT,
    "method.intra_region_weight": WEIGHT,
    "method.inter_student_weight": WEIGHT,
    "method.inter_teacher_weight": WEIGHT,
    "method.released_weight": WEIGHT,
    "method.student_temp": TEMPERATURE,
    "method.teacher_temp": TEMPERATURE,
    "method.warmup_teacher_temp": TEMPERATURE,
    "method.warmup_teacher_temp_epochs": Whole(0, 10**6),
    "method.teacher_momentum": SHARE,
    "method.teacher_momentum_end": SHARE,
    "method.momentum_batch_size": IMAGES,
    "method.centering": Choice(("ema", "sinkhorn")),
    "method.center_momentum": SHARE,
    "method.koleo_weight": WEIGHT,
    "method.mil_temp": TEMPERATURE,
    "method.mil_scorer": Choice(("gated", "attention", "class_token", "mean")),
    "method.mil_hidden_dim": WIDTH,
    "method.mil_heads": Whole(1, 64),
    "method.inter_direction": Choice(("bag_to_image", "image_to_bag")),
    "method.mil_warmup_epochs": EPOCHS,
    "method.mil_entropy_weight": Number(-1e6, 1e6),
    "method.prototype_chunk": Whole(1, 2**22),
    "method.matched_targets": Choice(("expected", "gathered")),
    "model.name": Choice(MODELS),
    "model.patch_size": Whole(1, 512),
    "model.num_heads": Whole(1, 1024),
    "model.layer_norm_eps": Number(0, 1e-2),
    "model.registers": Whole(0, 1024),
    "model.window": Whole(1, 512),
    "model.drop_path": Number(0, 0.99),
    "model.dtype": DTYPE,
    "model.teacher_dtype": DTYPE,
    "model.packed_views": Flag(),
    "model.scan_blocks": Flag(),
    "model.attention": Choice(("xla", "cudnn")),
    "model.remat": Choice(("none", "dots", "full")),
    "init.weights": Text(),
    "init.network": Choice(("teacher", "student")),
    "init.heads": Flag(),
    "head.prototypes": Whole(2, 2**22),  # one is always certain: its entropy over log K is 0 / 0
    "head.share_prototypes": Flag(),
    "head.hidden_dim": WIDTH,
    "head.bottleneck_dim": WIDTH,
    "head.layers": Whole(1, 64),
    "head.batch_norm": Flag(),
    "head.norm_last_layer": Flag(),
    "data.source": Text(),
    "data.data_dir": Text(may_be_empty=False),
    "data.manual_dir": Text(),
    "data.folder": Text(),
    "data.eval_source": Text(),
    "data.eval_folder": Text(),
    "data.canvas_px": SIDE_PX,
    "data.grayscale": Flag(),
    "data.normalization": Normalization(("imagenet", "local_contrast")),
    "data.decode_threads": Whole(1, 1024),
    "data.cache": Choice(("auto", "ram", "disk", "none")),
    "data.cache_dir": Text(),
    "data.prefetch_batches": Whole(1, 1024),
    "views.global_px": SIDE_PX,
    "views.global_scale": Several(Number(0, 1, open_low=True), 2),
    "views.local_px": SIDE_PX,
    "views.local_scale": Several(Number(0, 1, open_low=True), 2),
    "views.local_count": Whole(0, 256),
    "views.key_patch_share": SHARE,
    "views.jitter_prob": SHARE,
    "views.brightness": Number(0, 10),
    "views.contrast": Number(0, 10),
    "views.saturation": Number(0, 10),
    "views.hue": Number(0, 0.5),
    "views.grayscale_prob": SHARE,
    "views.blur_sigma": Several(Number(0, 100, open_low=True), 2),
    "views.global_blur_prob": Several(SHARE, 2),
    "views.local_blur_prob": SHARE,
    "views.global_solarize_prob": Several(SHARE, 2),
    "views.dtype": DTYPE,
    "optim.lr": Number(0, 100, open_low=True),
    "optim.min_lr": Number(0, 100),
    "optim.warmup_epochs": EPOCHS,
    "optim.weight_decay": Number(0, 100),
    "optim.weight_decay_end": Number(0, 100),
    "optim.clip_grad": Number(0, 1e6),
    "optim.freeze_last_layer_epochs": EPOCHS,
    "mesh.data": Whole(1, 2**20, also=-1),
    "mesh.model": Whole(1, 2**20),
    "mesh.shard_state": Flag(),
    "train.batch_size": IMAGES,
    "train.accumulate": IMAGES,
    "train.epochs": SOME_EPOCHS,
    "train.log_every_steps": Whole(1, 10**9),
    "train.checkpoint_every_epochs": SOME_EPOCHS,
    "train.keep_checkpoints": Whole(1, 10**6),
    "train.stop_on_collapse": Flag(),
    "train.best_metric": Choice(tuple(BEST_METRICS)),
    "eval.protocols": Words(EVAL_PROTOCOLS),
    "eval.every_epochs": EPOCHS,
    "eval.protocols_between": Words(EVAL_PROTOCOLS),
    "eval.batch_size": IMAGES,
    "eval.resize_px": SIDE_PX,
    "eval.crop_px": SIDE_PX,
    "eval.features": Text(may_be_empty=False),
    "eval.last_blocks": Whole(1, 1024),
    "eval.knn_k": Several(Whole(1, 10**6), None),
    "eval.knn_temp": TEMPERATURE,
    "eval.fractions": Several(Number(0, 1, open_low=True), None),
    "eval.label_free_images": Whole(2, 10**6),
    "eval.linear_epochs": Whole(1, 10**4),
    "eval.linear_batch_size": IMAGES,
    "eval.linear_lrs": Several(Number(0, 1e4, open_low=True), None),
}


def keys(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """The values of a configuration by their full key, "optim.lr"."""
    found: dict[str, Any] = {}
    for name in config:
        value = config[name]
        found |= keys(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {f"{prefix}{name}": value}
    return found


def check_values(config: ConfigDict) -> None:
    """Checks that a configuration has every key and no other, and each value by itself.

    Raises:
        ConfigError: naming the first key that breaks a rule.
    """
    given, defaults = keys(config), keys(default())
    for key in given:
        if key not in defaults:
            raise ConfigError(f"{key} is no key of the configuration; {_suggestion(key, defaults)}")
    for key, usual in defaults.items():
        if key not in given:
            raise ConfigError(f"{key} is missing; set it, usual is {usual!r}")
        if given[key] is None and usual is None:  # left to `resolve`
            continue
        rule = RULES[key]
        reason = rule.broken(given[key])
        if reason:
            demand = "choose one of" if isinstance(rule, Choice | Joined) else "it must be"
            raise ConfigError(f"{key} is {given[key]!r}; {demand} {reason}")


def _suggestion(key: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]}?" if near else "cmd_jax/config.py has them all"
