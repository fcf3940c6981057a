"""What `benchmarks.quality` trains: methods, ablations and presets as data, and the runs that they make.

The recipe of a row is the base configuration, then the preset, then `--set`, then the row's own values. All rows of a seed
start from the same backbone weights, and read the same images in the same order as the same views: these are functions of the
seed and of the recipe alone.
"""

import ast
import json
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cmd_jax import config as config_lib
from cmd_jax.config import METHODS, ConfigDict, is_swin
from cmd_jax.data.sources import open_source
from cmd_jax.errors import ConfigError
from cmd_jax.evaluation.evaluate import load_metrics
from cmd_jax.evaluation.splits import Part, Splits, open_labelled_splits, spread
from cmd_jax.presets import PAPER
from cmd_jax.rules import keys
from cmd_jax.training.resume import differences
from cmd_jax.training.schedules import total_steps
from cmd_jax.validation import validate

ROOT = Path(__file__).parents[1]
BASELINES, OURS = ("dino", "esvit"), "cmd"
COMPARED = (*BASELINES, OURS)
LAMBDA = ("method.inter_student_weight", "method.inter_teacher_weight")

PAPER_BY_LOCATION = PAPER | {"method.region_matching": "location"}

# Of cmd: what each changes. One that changes nothing, because the recipe is so already, is left out and named. The second to
# the seventh are of the paper's objective, which has the inter-level terms, by location: by similarity it learns too little
# to tell them apart.
ABLATIONS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "paper_location": PAPER_BY_LOCATION,
    "without_student": PAPER_BY_LOCATION | {"method.inter_student_weight": 0.0},
    "without_teacher": PAPER_BY_LOCATION | {"method.inter_teacher_weight": 0.0},
    "paper_uniform": PAPER_BY_LOCATION | {"method.region_weights": "uniform"},
    "image_to_bag": PAPER_BY_LOCATION | {"method.inter_direction": "image_to_bag"},
    "mil_warmup": PAPER_BY_LOCATION | {"method.mil_warmup_epochs": 2.0},
    "without_image": {"method.intra_image_weight": 0.0},
    "without_region": {"method.intra_region_weight": 0.0},
    "without_koleo": {"method.koleo_weight": 0.0},
    "region_0.5": {"method.intra_region_weight": 0.5},
    "region_2": {"method.intra_region_weight": 2.0},
    "matching_similarity": {"method.region_matching": "similarity"},
    "regions_mil": {"method.region_weights": "teacher_mil"},
    "shared_prototypes": {"head.share_prototypes": True},
    "lambda_0.1": dict.fromkeys(LAMBDA, 0.1),
    "lambda_1": dict.fromkeys(LAMBDA, 1.0),
    "scorer_gated": {"method.mil_scorer": "gated", "method.mil_temp": 1.0},
    "scorer_gated_4": {"method.mil_scorer": "gated", "method.mil_temp": 1.0, "method.mil_heads": 4},
    "scorer_attention": {"method.mil_scorer": "attention", "method.mil_temp": 1.0},
    "scorer_mean": {"method.mil_scorer": "mean"},
    "pool_mil": {"method.image_pool": "mil"},
    "pool_cls": {"method.image_pool": "cls"},
    "pool_mean": {"method.image_pool": "mean"},
    "pool_cls_mil": {"method.image_pool": "cls+mil"},
    "pool_cls_mean_mil": {"method.image_pool": "cls+mean+mil"},
    "mil_temp_1": {"method.mil_temp": 1.0},
    "mil_temp_4": {"method.mil_temp": 4.0},
    "entropy_plus": {"method.mil_entropy_weight": 0.1},
    "entropy_minus": {"method.mil_entropy_weight": -0.1},
    "prototypes_64": {"head.prototypes": 64},
    "prototypes_1024": {"head.prototypes": 1024},
    "teacher_temp_0.02": {"method.teacher_temp": 0.02},
    "teacher_temp_0.04": {"method.teacher_temp": 0.04},
    "small_locals": {"views.local_scale": (0.05, 0.2)},
    "key_patches": {"views.key_patch_share": 1.0},
}
# What a recipe may turn on for cmd and no baseline has.
OF_CMD_ALONE = {"method.mil_entropy_weight": 0.0}


class Preset(NamedTuple):
    """How much is done.

    Attributes:
        about: for --list.
        settings: changes of the base configuration.
        seeds: where --seeds is not given.
        evaluations: of a run, for the learning curves, beside that at the start.
        images: of a split, at most, that are measured; None is all.
    """

    about: str
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    evaluations: int
    images: int | None


PRESETS = {
    "full": Preset("the base configuration's own epochs", {}, (0, 1, 2), 10, None),
    "smoke": Preset(
        "a dozen steps of a seed: it runs, and learns nothing",
        {
            "train.batch_size": 16,
            "method.momentum_batch_size": 16,
            "train.epochs": 0.1,
            "optim.warmup_epochs": 0.0,
            "method.mil_warmup_epochs": 0.0,
            "views.local_count": 1,
        },
        (0,),
        1,
        200,
    ),
}


class Run(NamedTuple):
    """One training run.

    Attributes:
        name: of its row.
        seed: of it.
        workdir: absolute.
        config: resolved.
        images: of the training split.
        steps: in all.
        command: of the main job.
    """

    name: str
    seed: int
    workdir: str
    config: ConfigDict
    images: int
    steps: int
    command: list[str]

    @property
    def title(self) -> str:
        return f"{self.name}/seed-{self.seed}"

    @property
    def log(self) -> str:
        return f"{self.workdir}.log"

    def finished(self) -> bool:
        """Whether nothing is left to train: the main job writes the last numbers when all else is written."""
        return load_metrics(self.workdir, self.steps) is not None


class Plan(NamedTuple):
    """All that is asked for.

    Attributes:
        runs: by row, in the order of the table, then by seed.
        same: ablations that are cmd as the recipe has it.
        splits: images to measure on.
        base: FILE[:PRESET] of the configuration.
        data: what it reads, for people.
    """

    runs: list[Run]
    same: list[str]
    splits: Splits
    base: str
    data: str


def make_plan(
    preset: str, folder: str | None, settings: Sequence[str], ablations: Sequence[str], seeds: Sequence[int], out: str
) -> Plan:
    """Checks everything that can be checked before training.

    Args:
        preset: a key of PRESETS.
        folder: images with train/CLASS/* and test/CLASS/*; None is the embedded data.
        settings: "section.key=value" each, for all rows.
        ablations: keys of ABLATIONS, or "all" alone.
        seeds: of every row.
        out: directory of the runs.

    Raises:
        ConfigError: a name or a value cannot work, the data has no labels, or a run in `out` was started with other values.
        DatasetError: the data cannot be read.
    """
    if preset not in PRESETS:
        raise ConfigError(f"--preset={preset} is no preset; choose {' or '.join(PRESETS)}")
    chosen = list(ABLATIONS) if list(ablations) == ["all"] else list(ablations)
    for name in chosen:
        if name not in ABLATIONS:
            raise ConfigError(f"--ablations={name} is none; choose all, or some of {', '.join(ABLATIONS)}")
    for option, values in (("--ablations", chosen), ("--seeds", list(seeds))):
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ConfigError(f"{option} has {twice[0]} more than once; name it once")
    base, config = base_config(folder)
    known = keys(config)
    common = {key: value for key, value in PRESETS[preset].settings.items() if key in known} | parsed(settings, config)
    if folder is not None:
        common = {"data.folder": os.path.abspath(os.path.expanduser(folder)), **common}
    shared = changed(config, common)
    splits, images = open_labelled_splits(shared), len(open_source(shared.data, "train"))

    def runs_of(name: str, own: dict[str, Any]) -> list[Run]:
        found = []
        for seed in seeds:
            values = {**common, **own, "seed": seed}
            try:
                values |= watching(changed(config, values), images, PRESETS[preset].evaluations, common)
                found.append(make_run(name, seed, base, changed(config, values), values, images, out))
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from error
        return found

    rows = {name: runs_of(name, method_values(name, shared)) for name in COMPARED}
    ours = rows[OURS][0].config.to_dict()
    same = []
    for name in chosen:
        runs = runs_of(name, method_values(OURS, shared) | ABLATIONS[name])
        if differences(ours, runs[0].config):
            rows[name] = runs
        else:
            same.append(name)
    runs = [run for of_row in rows.values() for run in of_row]
    for run in runs:
        check_unchanged(run)
    limit = PRESETS[preset].images
    if limit is not None:
        splits = Splits(*(Part(split, spread(len(split), limit)) for split in splits))
    return Plan(runs, same, splits, base, folder or shared.data.source)


def base_config(folder: str | None) -> tuple[str, ConfigDict]:
    """FILE[:PRESET] of the base configuration, and what it returns."""
    name, preset = ("configs/folder.py", "small") if folder is not None else ("configs/demo.py", "")
    config = runpy.run_path(str(ROOT / name))["get_config"](preset)
    return f"{name}:{preset}" if preset else name, config


def parsed(settings: Sequence[str], config: ConfigDict) -> dict[str, Any]:
    """Values of "section.key=value" by key; a word stays one.

    Raises:
        ConfigError: one has no key and value, or names what the command decides.
    """
    values: dict[str, Any] = {}
    for item in settings:
        key, separator, text = item.partition("=")
        if key == "seed":
            raise ConfigError(f"--set {item}: every row is trained with several seeds; give --seeds")
        if not separator or len(key.split(".")) != 2:
            raise ConfigError(f"--set {item} is no section.key=value; for example --set train.epochs=5")
        if key == "method.name":
            raise ConfigError(f"--set {item}: the methods are what is compared; leave it out, or change another key")
        try:
            values[key] = text if isinstance(keys(config).get(key), str) else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[key] = text
    return values


def changed(config: ConfigDict, values: dict[str, Any]) -> ConfigDict:
    """A copy with other values, each checked.

    Raises:
        ConfigError: naming the first key that is unknown or whose value breaks a rule.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        for key, value in values.items():
            section, _, name = key.rpartition(".")
            if section and section not in config:
                config[section] = ConfigDict()
            (config[section] if section else config)[name] = value
    validate(config)
    return config


def method_values(name: str, config: ConfigDict) -> dict[str, Any]:
    """What makes a row the method of that name; cmd is as the recipe has it, which may be one of its variants."""
    if name == OURS:
        return {}
    method = METHODS[name]
    pool = "mean" if is_swin(config) else method["image_pool"]  # a Swin has no class token
    terms = ("intra_image", "intra_region", "inter", "inter")
    weights = ("intra_image", "intra_region", "inter_student", "inter_teacher")
    return {
        "method.name": name,
        "method.image_pool": pool,
        **{f"method.{key}": method[key] for key in ("region_matching", "region_weights")},
        **{f"method.{weight}_weight": method[term] for weight, term in zip(weights, terms, strict=True)},
        **{key: value for key, value in OF_CMD_ALONE.items() if key in keys(config)},
    }


def pools(config: ConfigDict) -> tuple[str, ...]:
    """What features are made of."""
    return ("mean", "mil") if is_swin(config) else ("cls", "mean", "mil")


def watching(config: ConfigDict, images: int, evaluations: int, given: dict[str, Any]) -> dict[str, Any]:
    """How a run is watched, which changes nothing that it learns: curves, log, checkpoints; what --set names stays."""
    epochs, steps = config.train.epochs, total_steps(config, images)
    values = {
        "eval.features": "+".join(pools(config)),  # the same for all: curves that start from one point
        "eval.protocols": ("knn",),
        "eval.protocols_between": ("knn",),
        "eval.every_epochs": epochs / evaluations,
        "train.log_every_steps": max(1, steps // 60),
        "train.checkpoint_every_epochs": epochs / 4,
        "train.keep_checkpoints": 1,
    }
    return {key: value for key, value in values.items() if key not in given}


def make_run(name: str, seed: int, base: str, config: ConfigDict, values: dict[str, Any], images: int, out: str) -> Run:
    """A run of a checked configuration.

    Raises:
        ConfigError: its values do not fit together or the data.
    """
    if config.train.batch_size > images:
        raise ConfigError(f"train.batch_size is {config.train.batch_size}, but there are {images} training images; use fewer")
    resolved = config_lib.resolve(config, images)
    validate(resolved)
    workdir = os.path.join(os.path.abspath(out), name, f"seed-{seed}")
    flags = [f"--config.{key}={value if isinstance(value, str) else repr(value)}" for key, value in values.items()]
    command = [sys.executable, "-m", "cmd_jax.main", f"--config={base}", f"--workdir={workdir}", *flags]
    return Run(name, seed, workdir, resolved, images, total_steps(resolved, images), command)


def check_unchanged(run: Run) -> None:
    """Refuses a work directory that was started with other values.

    Raises:
        ConfigError: naming the first three of them.
    """
    path = os.path.join(run.workdir, "config.json")
    if not os.path.exists(path):
        return
    found = differences(config_lib.read_json(path), run.config)
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise ConfigError(
            f"{run.workdir} was started with other values: {'; '.join(found[:3])}{more}; ask for the same again, or give "
            "another --out"
        )


def listing() -> str:
    """Presets, methods and ablations with what they change, for --list."""
    plain = lambda values: ", ".join(f"{key}={json.dumps(value)}" for key, value in values.items()) or "nothing"
    _, config = base_config(None)
    lines = ["presets"]
    lines += [f"  {name:20} {preset.about}: {plain(preset.settings)}" for name, preset in PRESETS.items()]
    lines += ["methods"]
    lines += [f"  {name:20} {plain(method_values(name, config))}" for name in COMPARED]
    lines += ["ablations of cmd"]
    lines += [f"  {name:20} {plain(values)}" for name, values in ABLATIONS.items()]
    return "\n".join(lines)
