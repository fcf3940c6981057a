"""The metrics of `metrics.jsonl` by step, as plotly figures and tables."""

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
    ("Training health", "0 to 1", ("teacher_entropy", "marginal_entropy", "feature_std", "mil_entropy")),
    ("Gradient norm", "", ("grad_norm",)),
    ("Learning rate", "", ("learning_rate",)),
    ("Weight decay", "", ("weight_decay",)),
    ("Teacher momentum", "", ("teacher_momentum",)),
    ("Teacher temperature", "", ("teacher_temp",)),
    ("Throughput", "images/s", ("images_per_s",)),
    ("Waiting for data", "seconds so far", ("data_wait_s",)),
    ("Skipped steps and images", "count", ("bad_steps", "bad_images")),
    ("Evaluation", "percent", ("eval_knn*_top1", "eval_rank1", "eval_map")),
    ("Clustering", "percent", ("eval_cluster_*",)),
    ("Few-shot", "percent", ("eval_few_shot*",)),
    ("Class-disjoint retrieval", "percent", ("eval_disjoint_recall*",)),
    ("Labelling effort", "percent", ("eval_labels*",)),
    ("Effective rank of the features", "RankMe", ("eval_rankme",)),
)
HIDDEN = ("bad_steps_in_row",)  # the state of a rule, not a result
# At least 3 to 1 against the page's light and its dark background.
COLOURS = ("#3b82d6", "#d9622b", "#1f9468", "#c2569f", "#a07d12", "#8468d8", "#1890a6", "#7a818c")
DASHES = ("solid", "dash", "dot")  # where the colours repeat
AXIS = {"gridcolor": "rgba(128,128,128,.25)", "zeroline": False, "automargin": True, "fixedrange": True}


class Curve(NamedTuple):
    """A metric by step; None where it was not finite."""

    steps: list[int]
    values: list[float | None]


def read_curves(workdir: str) -> dict[str, Curve]:
    """Reads every key of `metrics.jsonl`; none without the file. A line cut off by a kill is left out."""
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
    """Draws the curves of one run, or of several over each other.

    Args:
        runs: names and curves.

    Returns:
        For each chart with data: id, title, unit, keys, legend (label, colour; empty for a single curve), a plotly figure,
        a summary in words, and a table of some steps (head, rows). One run: a curve a key. Several: a chart a key, a curve
        a run.
    """
    found, several = [], len(runs) > 1
    for title, unit, keys in _groups(sorted({key for _, curves in runs for key in curves})):
        parts = [(key if len(keys) > 1 else title, [key]) for key in keys] if several else [(title, keys)]
        for part, chosen in parts:
            series = [
                (name if several else key, run if several else number, curves[key])
                for run, (name, curves) in enumerate(runs)
                for number, key in enumerate(chosen)
                if key in curves
            ]
            found.append(
                {
                    "id": f"chart-{len(found)}",
                    "title": part,
                    "unit": unit,
                    "keys": chosen,
                    "legend": [(label, colour(number)) for label, number, _ in series] if several or len(series) > 1 else [],
                    "figure": _figure([(number, curve) for _, number, curve in series]),
                    "summary": "; ".join(f"{label} {_course(curve)}" for label, _, curve in series),
                    "table": _table([(label, curve) for label, _, curve in series]),
                }
            )
    return found


def colour(number: int) -> str:
    """The colour of a curve or a run by its number."""
    return COLOURS[number % len(COLOURS)]


def _figure(series: list[tuple[int, Curve]]) -> dict[str, Any]:
    """A plotly figure of numbered curves, without names: plotly reads marks of HTML in them, so the legend is outside."""
    traces = []
    for number, curve in series:
        chosen = _evenly(len(curve.steps), POINTS)
        dash = DASHES[number // len(COLOURS) % len(DASHES)]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(chosen) < 40 else "lines",
                "x": [curve.steps[i] for i in chosen],
                "y": [curve.values[i] for i in chosen],
                "line": {"color": colour(number), "width": 2, "dash": dash},
                "marker": {"size": 4},
                "hovertemplate": "%{y:.4~g}<extra></extra>",
            }
        )
    xaxis = {"title": {"text": "step", "standoff": 4}, "nticks": 6, "hoverformat": ",d", "tickformat": "~s"}
    yaxis = {"nticks": 5, "exponentformat": "e"}
    known = {value for _, curve in series for value in curve.values if value is not None}
    if len(known) == 1:  # a flat line lies in the middle
        yaxis["range"] = sorted((0, 2 * known.pop() or 1))
    return {"data": traces, "layout": layout(hovermode="x unified", xaxis=AXIS | xaxis, yaxis=AXIS | yaxis)}


def layout(**more: Any) -> dict[str, Any]:
    """The layout of all figures; the style sheet colours their text."""
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "margin": {"l": 44, "r": 12, "t": 8, "b": 34},
        "showlegend": False,
        "dragmode": False,
        "hoverlabel": {"bgcolor": "#1b1e24", "font": {"color": "#ffffff"}},
        **more,
    }


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
