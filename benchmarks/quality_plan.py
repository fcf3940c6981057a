"""The runs of `benchmarks.quality`: methods, ablations and presets as data.

The configuration of a row is the base configuration, then the preset, then `--set`, then the row's own values. All rows of a
seed start from the same backbone weights and see the same views of the same images in the same order: these depend on the
seed and the shared configuration alone.
"""

import json
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.timing import parse_value
from cmd_jax import config as config_lib
from cmd_jax.config import ConfigDict, flatten, has_class_token, validate
from cmd_jax.config.presets import PAPER
from cmd_jax.datasets.prepared import open_source
from cmd_jax.errors import ConfigError
from cmd_jax.evaluation.splits import Part, Splits, open_labelled_splits, spread
from cmd_jax.metrics import load_metrics
from cmd_jax.training.resume import config_differences
from cmd_jax.training.schedules import total_steps
from cmd_jax.weights.transfer import follow_source

ROOT = Path(__file__).parents[1]
BASELINES, OURS = ("dino", "esvit", "ibot"), "cmd"
COMPARED = (*BASELINES, OURS)
LAMBDA = ("method.inter_student_weight", "method.inter_teacher_weight")

PAPER_BY_LOCATION = PAPER | {"method.region_matching": "location"}

# What each changes of cmd. The second to the fifth belong to the paper's objective, which has the inter-level terms, with
# regions matched by location: by similarity it learns too little to tell them apart.
ABLATIONS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "paper_location": PAPER_BY_LOCATION,
    "without_student": PAPER_BY_LOCATION | {"method.inter_student_weight": 0.0},
    "without_teacher": PAPER_BY_LOCATION | {"method.inter_teacher_weight": 0.0},
    "paper_uniform": PAPER_BY_LOCATION | {"method.region_weights": "uniform"},
    "image": {"method.intra_image_weight": 1.0},
    "without_image": {"method.intra_image_weight": 0.0},
    "without_region": {"method.intra_region_weight": 0.0},
    "relation": {"method.relation_weight": 1.0},
    "without_relation": {"method.relation_weight": 0.0},
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
    "prototypes_64": {"head.prototypes": 64},
    "prototypes_1024": {"head.prototypes": 1024},
    "teacher_temp_0.02": {"method.teacher_temp": 0.02},
    "teacher_temp_0.04": {"method.teacher_temp": 0.04},
    "small_locals": {"views.local_scale": (0.05, 0.2)},
}


class Preset(NamedTuple):
    """How much is trained and measured.

    Attributes:
        about: for --list.
        settings: changes of the base configuration.
        seeds: default of --seeds.
        evaluations: during a run, for its learning curve.
        images: most images of a split that are measured; None is all.
    """

    about: str
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    evaluations: int
    images: int | None


PRESETS = {
    "full": Preset("the base configuration's own epochs", {}, (0, 1, 2), 10, None),
    "smoke": Preset(
        "a dozen steps of one seed, to see that it runs",
        {
            "train.batch_size": 16,
            "method.momentum_batch_size": 16,
            "train.epochs": 0.1,
            "optim.warmup_epochs": 0.0,
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
        row: the method or ablation.
        seed: of the run.
        workdir: absolute path.
        config: resolved.
        images: number of training images.
        steps: number of steps.
        command: of the training process.
    """

    row: str
    seed: int
    workdir: str
    config: ConfigDict
    images: int
    steps: int
    command: list[str]

    @property
    def name(self) -> str:
        return f"{self.row}/seed-{self.seed}"

    def finished(self) -> bool:
        """Whether the last evaluation is written, which comes after everything else."""
        return load_metrics(self.workdir, self.steps) is not None


class Plan(NamedTuple):
    """All runs of a comparison.

    Attributes:
        rows: runs by row, one for each seed.
        same: ablations that change nothing, because the shared configuration has these values already.
        splits: the images to measure on.
        base: FILE[:PRESET] of the base configuration.
        data: name of the data.
    """

    rows: dict[str, list[Run]]
    same: list[str]
    splits: Splits
    base: str
    data: str

    @property
    def runs(self) -> list[Run]:
        return [run for runs in self.rows.values() for run in runs]


def make_plan(
    preset: str,
    folder: str | None,
    settings: Sequence[str],
    ablations: Sequence[str],
    seeds: Sequence[int],
    out: str,
    weights: str | None = None,
    baselines: Sequence[str] = BASELINES,
) -> Plan:
    """Checks everything that can be checked before training.

    Args:
        preset: a key of PRESETS.
        folder: images in train/CLASS/* and test/CLASS/*; None is the embedded data.
        settings: "section.key=value" each, for all rows.
        ablations: keys of ABLATIONS, or "all" alone.
        seeds: of every row.
        out: directory of the runs.
        weights: that all rows start from, as `init.weights`; None: random ones.
        baselines: some of BASELINES, beside cmd.

    Raises:
        ConfigError: a name or value is wrong, the data has no labels, or a run in `out` was started with other values.
        DatasetError: the data cannot be read.
    """
    if preset not in PRESETS:
        raise ConfigError(f"unknown --preset={preset}; choose {' or '.join(PRESETS)}")
    chosen = list(ABLATIONS) if list(ablations) == ["all"] else list(ablations)
    unknown = [name for name in chosen if name not in ABLATIONS]
    if unknown:
        raise ConfigError(f"unknown --ablations={unknown[0]}; choose all, or some of {', '.join(ABLATIONS)}")
    for option, values in (("--ablations", chosen), ("--seeds", list(seeds))):
        if len(set(values)) < len(values):
            raise ConfigError(f"{option} has a value twice: {' '.join(map(str, values))}; give each once")
    base, config = base_config(folder, weights)
    common = {key: value for key, value in PRESETS[preset].settings.items() if key in flatten(config)}
    common |= _settings(settings, config)
    if folder is not None:
        common = {"data.folder": os.path.abspath(os.path.expanduser(folder)), **common}
    if weights is not None:
        there = os.path.exists(os.path.expanduser(weights))  # or a name on the hub
        common = {"init.weights": os.path.abspath(os.path.expanduser(weights)) if there else weights, **common}
    shared = changed(config, common)
    splits, images = open_labelled_splits(shared), len(open_source(shared.data, "train"))

    def runs(row: str, own: dict[str, Any]) -> list[Run]:
        found = []
        for seed in seeds:
            values = {**common, **own, "seed": seed}
            try:
                values |= _logging(changed(config, values), images, PRESETS[preset].evaluations, common)
                found.append(_make_run(row, seed, base, changed(config, values), values, images, out))
            except ConfigError as error:
                raise ConfigError(f"{row}: {error}") from error
        return found

    rows = {name: runs(name, method_values(name, shared)) for name in (*baselines, OURS)}
    of_ablations = {name: runs(name, method_values(OURS, shared) | ABLATIONS[name]) for name in chosen}
    ours = rows[OURS][0].config.to_dict()
    same = [name for name, of_row in of_ablations.items() if not config_differences(ours, of_row[0].config)]
    rows |= {name: of_row for name, of_row in of_ablations.items() if name not in same}
    limit = PRESETS[preset].images
    if limit is not None:
        splits = Splits(*(Part(split, spread(len(split), limit)) for split in splits))
    return Plan(rows, same, splits, base, folder or shared.data.source)


def base_config(folder: str | None, weights: str | None = None) -> tuple[str, ConfigDict]:
    """FILE[:PRESET] of the base configuration, and what it returns.

    Raises:
        ConfigError: weights without a folder.
    """
    if weights is not None and folder is None:
        raise ConfigError(f"--weights={weights} needs photographs: give --folder=PHOTOS too")
    of_folder = "continue_small" if weights is not None else "small"
    name, preset = ("configs/folder.py", of_folder) if folder is not None else ("configs/demo.py", "")
    config = runpy.run_path(str(ROOT / name))["get_config"](preset)
    if weights is not None:
        config.init.weights = weights
    return f"{name}:{preset}" if preset else name, config


def _settings(settings: Sequence[str], config: ConfigDict) -> dict[str, Any]:
    """Values of "section.key=value" by key.

    Raises:
        ConfigError: the form is wrong, or the key is one that the command decides.
    """
    values: dict[str, Any] = {}
    for item in settings:
        key, separator, text = item.partition("=")
        if key == "seed":
            raise ConfigError(f"--set {item}: every row is trained with several seeds; give --seeds")
        if not separator or len(key.split(".")) != 2:
            raise ConfigError(f"--set {item} must be section.key=value, for example --set train.epochs=5")
        if key == "method.name":
            raise ConfigError(f"--set {item}: the methods are what is compared; leave it out, or change another key")
        values[key] = text if isinstance(flatten(config).get(key), str) else parse_value(text)
    return values


def changed(config: ConfigDict, values: dict[str, Any]) -> ConfigDict:
    """A copy with other values.

    Raises:
        ConfigError: a key is unknown or its value breaks a rule.
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
    """The values that make a row the method of that name; cmd is as the shared configuration has it."""
    if name == OURS:
        return {}
    values = config_lib.method_values(name)
    if not has_class_token(config):
        values["method.image_pool"] = "mean"
    return {"method.name": name, **values}


def pools(config: ConfigDict) -> tuple[str, ...]:
    """The pools that features are made of."""
    return ("cls", "mean", "mil") if has_class_token(config) else ("mean", "mil")


def _logging(config: ConfigDict, images: int, evaluations: int, given: dict[str, Any]) -> dict[str, Any]:
    """Values of evaluation, log and checkpoints, on which training does not depend; --set wins."""
    config = config_lib.resolve(config, images)
    epochs = config.train.epochs
    values = {
        "eval.features": "+".join(pools(config)),  # the same for all rows, so that their curves start at one point
        "eval.protocols": ("knn",),
        "eval.protocols_between": ("knn",),
        "eval.every_epochs": epochs / evaluations,
        "train.log_every_steps": max(1, total_steps(config, images) // 60),
        "train.checkpoint_every_epochs": epochs / 4,
        "train.keep_checkpoints": 1,
    }
    return {key: value for key, value in values.items() if key not in given}


def _make_run(row: str, seed: int, base: str, config: ConfigDict, values: dict[str, Any], images: int, out: str) -> Run:
    """A run of a validated configuration.

    Raises:
        ConfigError: its values do not fit the data, or its work directory was started with others.
    """
    if config.train.batch_size > images:
        raise ConfigError(f"train.batch_size is {config.train.batch_size}, but there are {images} training images; use fewer")
    resolved = config_lib.resolve(follow_source(config)[0], images)
    validate(resolved)
    workdir = os.path.join(os.path.abspath(out), row, f"seed-{seed}")
    stored = os.path.join(workdir, "config.json")
    found = config_differences(config_lib.read_json(stored), resolved) if os.path.exists(stored) else []
    if found:
        raise ConfigError(
            f"{workdir} was started with other values: {'; '.join(found[:3])}{' ...' * (len(found) > 3)}; use the same values, "
            "or another --out"
        )
    flags = [f"--config.{key}={value if isinstance(value, str) else repr(value)}" for key, value in values.items()]
    command = [sys.executable, "-m", "cmd_jax.main", f"--config={base}", f"--workdir={workdir}", *flags]
    return Run(row, seed, workdir, resolved, images, total_steps(resolved, images), command)


def listing() -> str:
    """Presets, methods and ablations with what they change, for --list."""
    _, config = base_config(None)
    sections = {
        "presets": {f"{name:20} {preset.about}:": preset.settings for name, preset in PRESETS.items()},
        "methods": {f"{name:20}": method_values(name, config) for name in COMPARED},
        "ablations of cmd": {f"{name:20}": values for name, values in ABLATIONS.items()},
    }
    lines = []
    for title, rows in sections.items():
        lines.append(title)
        for name, values in rows.items():
            changes = ", ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
            lines.append(f"  {name} {changes or 'nothing'}")
    return "\n".join(lines)
