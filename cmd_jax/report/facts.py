"""Settings, results and versions of a run, as rows of text for the page."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from typing import NamedTuple

import cmd_jax
from cmd_jax import config as config_lib
from cmd_jax import files
from cmd_jax.config import ConfigDict
from cmd_jax.data.sources import where
from cmd_jax.errors import ConfigError
from cmd_jax.metrics import Metrics
from cmd_jax.report.curves import Curve

HEADLINES = 4
PREFERRED = ("knn20_top1", "linear_top1", "logistic_top1", "rank1", "map")  # as headlines, in this order
VERSIONS = ("jax", "jaxlib", "flax", "optax", "numpy", "pillow", "scikit-learn", "plotly")


class ShownNumber(NamedTuple):
    """One metric of an evaluation as text.

    Attributes:
        key: in metrics.json.
        title: of the number.
        value: with its unit.
        before: at the start of the run, or "".
        change: from there, with its sign, or "".
        interval: 95 % interval, or "".
        protocol: how it was measured.
    """

    key: str
    title: str
    value: str
    before: str
    change: str
    interval: str
    protocol: str


def numbers(metrics: Metrics, before: Metrics | None) -> list[ShownNumber]:
    """Formats the metrics of an evaluation; `before` are those at the start of the run."""
    found, start = [], {} if before is None else before.values()
    for number in metrics.numbers:
        value, unit, old = number.value, number.unit, start.get(number.key)
        found.append(
            ShownNumber(
                number.key,
                number.title,
                text(value, unit),
                "" if old is None else text(old, unit),
                "" if None in (value, old) else f"{value - old:+.2f}".replace("-", "\N{MINUS SIGN}"),
                "" if number.low is None else f"{text(number.low, unit)} to {text(number.high, unit)}",
                number.protocol,
            )
        )
    return found


def headlines(found: list[ShownNumber]) -> list[ShownNumber]:
    """Selects the metrics at the top of the page: the usual ones, else the first."""
    usual = sorted((n for n in found if n.key in PREFERRED), key=lambda n: PREFERRED.index(n.key))
    return (usual or found)[:HEADLINES]


def text(value: float | None, unit: str = "percent") -> str:
    """Formats a number with two decimals and its unit; "not finite" for None."""
    if value is None:
        return "not finite"
    return f"{value:.2f} %" if unit == "percent" else f"{value:.4g}"


def read_config(workdir: str) -> ConfigDict:
    """Reads the resolved configuration of a run.

    Raises:
        ConfigError: the directory holds none.
    """
    path = os.path.join(workdir, "config.json")
    if not files.exists(path):
        raise ConfigError(f"{workdir} has no config.json; give the --workdir of a run of cmd_jax.main")
    return config_lib.load(path)


def flat(config: ConfigDict) -> dict[str, str]:
    """Lists every key with its value as text: {"train.batch_size": "64"}."""
    found = {}
    for name, section in config.to_dict().items():
        values = section if isinstance(section, dict) else {"": section}
        found |= {f"{name}.{key}".rstrip("."): json.dumps(value, ensure_ascii=False) for key, value in values.items()}
    return found


def changed(config: ConfigDict) -> list[tuple[str, str, str]]:
    """Lists (key, value, default) of the changed settings; a value in place of an open default (null) is no change."""
    defaults = flat(config_lib.default())
    return [
        (key, value, defaults[key]) for key, value in flat(config).items() if defaults.get(key) not in (value, "null", None)
    ]


def run_facts(
    config: ConfigDict, curves: dict[str, Curve], step: int | None, outcome: str | None = None
) -> list[tuple[str, str]]:
    """Describes what was run, as (title, text)."""
    found = [
        ("Method", f"{config.method.name}, {config.head.prototypes:,} prototypes"),
        ("Backbone", f"{config.model.name}, patches of {config.model.patch_size} px, {config.model.dtype}"),
        ("Data", where(config.data)),
        ("Views", f"2 x {config.views.global_px} px, {config.views.local_count} x {config.views.local_px} px"),
        ("Start", config_lib.start_name(config)),
        ("Length", f"{config.train.epochs:g} epochs, batches of {config.train.batch_size}"),
        ("Seed", str(config.seed)),
    ]
    if step is not None:
        seen = step * config.train.batch_size
        found.append(("Teacher of step", f"{step:,}; {seen:,} images seen"))
    if outcome:
        found.append(("Result", outcome.removeprefix("result: ")))
    speed = [value for value in curves["images_per_s"].values if value] if "images_per_s" in curves else []
    if speed:
        done = curves["images_per_s"].steps[-1] * config.train.batch_size
        found.append(("Speed", f"{speed[-1]:,.1f} images/s; the steps alone took about {duration(done / speed[-1])}"))
    return found


def duration(seconds: float) -> str:
    """Formats a time in seconds, minutes, or hours and minutes."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def versions() -> list[tuple[str, str]]:
    """Lists device and package versions as (title, text), and the commit where the package is in a checkout."""
    import jax

    device = jax.devices()[0]
    found = [
        ("Date", datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("Device", f"{jax.device_count()} x {device.device_kind}"),
        ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("cmd_jax", cmd_jax.__version__),
    ]
    commit = source_commit()
    if commit:
        found.append(("Commit", commit))
    return found + [(name, _version(name)) for name in VERSIONS]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def source_commit(root: str | None = None) -> str:
    """Finds the commit of the checkout that the package lies in, and whether files differ; "" of an installed package.

    Args:
        root: directory of the checkout; None: where the package lies.
    """
    root = root or os.path.dirname(os.path.dirname(os.path.abspath(cmd_jax.__file__)))
    if not os.path.exists(os.path.join(root, ".git")):
        return ""
    commit = _git(root, "rev-parse", "HEAD")
    return f"{commit}, with changes" if commit and _git(root, "status", "--porcelain", "--untracked-files=no") else commit


def _git(root: str, *arguments: str) -> str:
    """What git prints; "" where there is no git, or it refuses."""
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
