"""What `metrics.jsonl` says, as charts and tables."""

import json
import math
import os
from typing import Any, NamedTuple

from cmd_jax import files

POINTS = 1000  # of a curve on the page; more are thinned
ROWS = 30  # of a chart's table
# Charts in their order: title, unit of the axis, keys, in which * stands for any letters. What no chart names gets its own.
CHARTS = (
    ("Loss", "", ("loss",)),
    ("Loss terms, unweighted", "", ("loss_*",)),
    ("Health of the teacher", "0 to 1", ("teacher_entropy", "marginal_entropy", "feature_std", "mil_entropy")),
    ("Gradient norm", "", ("grad_norm",)),
    ("Learning rate", "", ("learning_rate",)),
    ("Weight decay", "", ("weight_decay",)),
    ("Teacher momentum", "", ("teacher_momentum",)),
    ("Teacher temperature", "", ("teacher_temp",)),
    ("Throughput", "images/s", ("images_per_s",)),
    ("Waiting for data", "seconds so far", ("data_wait_s",)),
    ("Steps and images left out", "count", ("bad_steps", "bad_images")),
    ("Evaluations", "percent", ("eval_knn*_top1", "eval_rank1", "eval_map")),
    ("Effective rank of the features", "RankMe", ("eval_rankme",)),
)
HIDDEN = ("bad_steps_in_row",)  # the state of a rule, not a result


class Curve(NamedTuple):
    """A number over the steps; None where it was not finite."""

    steps: list[int]
    values: list[float | None]


def read_curves(workdir: str) -> dict[str, Curve]:
    """Every key of `metrics.jsonl` with its numbers; empty without the file. A line cut off by a kill is left out."""
    path = os.path.join(workdir, "metrics.jsonl")
    curves: dict[str, Curve] = {}
    lines = files.read(path).splitlines(keepends=True) if files.exists(path) else []
    for line in lines:
        if not line.endswith("\n"):
            continue
        numbers = json.loads(line)
        step = numbers.pop("step")
        for key, value in numbers.items():
            curve = curves.setdefault(key, Curve([], []))
            curve.steps.append(step)
            curve.values.append(value if value is not None and math.isfinite(value) else None)
    return curves


def charts(runs: list[tuple[str, dict[str, Curve]]]) -> list[dict[str, Any]]:
    """Charts of one run, or of several over each other.

    Args:
        runs: names and curves.

    Returns:
        For each chart with data: id, title, unit, keys, whether it needs a legend, traces (label, colour number, x, y), a
        summary in words, and a table of some steps (head, rows). One run: a trace a key. Several: a chart a key, a trace a run.
    """
    found, several = [], len(runs) > 1
    for title, unit, keys in _groups(sorted({key for _, curves in runs for key in curves})):
        parts = [(key if len(keys) > 1 else title, [key]) for key in keys] if several else [(title, keys)]
        for part, chosen in parts:
            curves = [
                (name if several else key, number, of_run[key])
                for number, (name, of_run) in enumerate(runs)
                for key in chosen
                if key in of_run
            ]
            traces = [
                {"label": label, "colour": run if several else number, **_thinned(curve)}
                for number, (label, run, curve) in enumerate(curves)
            ]
            series = [(label, curve) for label, _, curve in curves]
            found.append(
                {
                    "id": f"chart-{len(found)}",
                    "title": part,
                    "unit": unit,
                    "keys": chosen,
                    "legend": several or len(traces) > 1,
                    "traces": traces,
                    "summary": "; ".join(f"{label} {_course(curve)}" for label, curve in series),
                    "table": _table(series),
                }
            )
    return found


def _groups(keys: list[str]) -> list[tuple[str, str, list[str]]]:
    groups, left = [], [key for key in keys if key not in HIDDEN]
    for title, unit, patterns in CHARTS:
        chosen = [key for pattern in patterns for key in left if _matches(key, pattern)]
        if chosen:
            groups.append((title, unit, chosen))
            left = [key for key in left if key not in chosen]
    return groups + [(key, "", [key]) for key in left if not key.startswith("eval_")]


def _matches(key: str, pattern: str) -> bool:
    head, star, tail = pattern.partition("*")
    return key.startswith(head) and key.endswith(tail) if star else key == pattern


def _thinned(curve: Curve) -> dict[str, list]:
    chosen = _evenly(len(curve.steps), POINTS)
    return {"x": [curve.steps[i] for i in chosen], "y": [curve.values[i] for i in chosen]}


def _evenly(count: int, wanted: int) -> list[int]:
    """Up to `wanted` of 0..count - 1, evenly, with the first and the last."""
    if count <= wanted:
        return list(range(count))
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]


def _course(curve: Curve) -> str:
    finite = [value for value in curve.values if value is not None]
    return f"from {number(finite[0])} to {number(finite[-1])}" if finite else "has no finite number"


def _table(series: list[tuple[str, Curve]]) -> dict[str, list]:
    steps = sorted({step for _, curve in series for step in curve.steps})
    by_step = [dict(zip(curve.steps, curve.values, strict=True)) for _, curve in series]
    rows = [
        [f"{steps[i]:,}", *(number(values[steps[i]]) if steps[i] in values else "" for values in by_step)]
        for i in _evenly(len(steps), ROWS)
    ]
    return {"head": ["step", *(label for label, _ in series)], "rows": rows}


def number(value: float | None) -> str:
    """Four digits; "not finite" for None."""
    return "not finite" if value is None else f"{value:.4g}"
