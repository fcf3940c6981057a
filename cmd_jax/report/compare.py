"""A page that compares runs by the files of their work directories: metrics, curves, and differences of configuration."""

import os
from typing import Any, NamedTuple

from cmd_jax import files
from cmd_jax.config import ConfigDict
from cmd_jax.errors import ConfigError
from cmd_jax.metrics import Metrics, load_all_metrics
from cmd_jax.report import curves as curves_lib
from cmd_jax.report import facts
from cmd_jax.report.render import render


class RunFiles(NamedTuple):
    """Files of a run, as read from its work directory.

    Attributes:
        name: of the directory, made different from the other runs'.
        workdir: the directory.
        config: resolved.
        curves: of `metrics.jsonl`.
        metrics: of the last evaluation; None without one.
        before: those at the start of the run, or None.
    """

    name: str
    workdir: str
    config: ConfigDict
    curves: dict[str, curves_lib.Curve]
    metrics: Metrics | None
    before: Metrics | None


def write_comparison(workdirs: list[str], out: str) -> list[str]:
    """Writes a page that compares runs, `index.html` in the directory `out`, and returns its path in a list.

    Raises:
        ConfigError: a directory holds no run, or is named twice.
    """
    runs = read_runs(workdirs)
    files.make_directory(out)
    path = os.path.join(out, "index.html")
    files.write(path, comparison_page(runs))
    return [path]


def read_runs(workdirs: list[str]) -> list[RunFiles]:
    """Reads the runs, in the given order.

    Raises:
        ConfigError: a directory holds no run, or is named twice.
    """
    paths = [os.path.abspath(path) if not files.is_remote(path) else path.rstrip("/") for path in workdirs]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"--workdir={path} is given twice; name each run once")
    runs = []
    for name, path in zip(different_names(paths), paths, strict=True):
        config, found = facts.read_config(path), load_all_metrics(path)
        last = max(found, default=None)
        before = found.get(0) if last else None
        runs.append(RunFiles(name, path, config, curves_lib.read_curves(path), found.get(last), before))
    return runs


def different_names(paths: list[str]) -> list[str]:
    """Names runs by the last part of each path, or by as many last parts as tell them apart."""
    parts = [path.strip("/").split("/") for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def comparison_page(runs: list[RunFiles]) -> str:
    """Renders the comparison to HTML."""
    charts = curves_lib.charts([(run.name, run.curves) for run in runs])
    return render(
        "compare.html",
        runs=[
            {
                "name": run.name,
                "colour": curves_lib.colour(number),
                "step": run.metrics.step if run.metrics else None,
                "facts": facts.run_facts(run.config, run.curves, run.metrics.step if run.metrics else None),
            }
            for number, run in enumerate(runs)
        ],
        numbers=number_table(runs),
        charts=charts,
        differences=differences(runs),
        data={"charts": [{key: chart[key] for key in ("id", "figure")} for chart in charts]},
    )


def number_table(runs: list[RunFiles]) -> list[dict[str, Any]]:
    """Makes a row for each metric that any run has.

    Returns:
        For each key its title, whether all runs measured it by one protocol, the protocols, and a cell a run: value,
        interval, value at the start, and mark. Of percentages more is better: the best is marked "best", and those whose
        interval overlaps the interval of the best, "tie". Numbers without that unit, and those of chance, are not marked.
    """
    tables = [{n.key: n for n in (facts.numbers(run.metrics, run.before) if run.metrics else [])} for run in runs]
    keys = list(dict.fromkeys(key for table in tables for key in table))
    rows = []
    for key in keys:
        cells = [table.get(key) for table in tables]
        protocols = [cell.protocol if cell else "" for cell in cells]
        rows.append(
            {
                "key": key,
                "title": next(cell.title for cell in cells if cell),
                "same": len({protocol for protocol in protocols if protocol}) <= 1,
                "protocols": list(dict.fromkeys(protocol for protocol in protocols if protocol)),
                "cells": list(zip(cells, _marks(key, runs), strict=True)),
            }
        )
    return rows


def _marks(key: str, runs: list[RunFiles]) -> list[str]:
    found = [next((n for n in run.metrics.numbers if n.key == key), None) if run.metrics else None for run in runs]
    known = [number for number in found if number and number.value is not None]
    if "chance" in key or len(known) < 2 or known[0].unit != "percent":
        return [""] * len(runs)
    best = max(known, key=lambda number: number.value)
    low = best.value if best.low is None else best.low
    marks = []
    for number in found:
        if number is None or number.value is None:
            marks.append("")
            continue
        high = number.value if number.high is None else number.high
        marks.append("best" if number.value == best.value else "tie" if high >= low else "")
    return marks


def differences(runs: list[RunFiles]) -> list[list[str]]:
    """Lists the keys that differ between runs, each with every run's value."""
    tables = [facts.flat(run.config) for run in runs]
    keys = list(dict.fromkeys(key for table in tables for key in table))
    rows = [[key, *(table.get(key, "") for table in tables)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]
