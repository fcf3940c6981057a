"""Statistics over seeds and the tables of `benchmarks.quality`."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from benchmarks.quality_plan import BASELINES, OURS, Run
from cmd_jax.report.curves import read_curves

COVERAGE = 0.95
COLUMNS = {
    "linear": "linear top-1",
    "knn": "k-NN top-1",
    "rank1": "Rank-1",
    "map": "mAP",
    "disjoint_recall1": "disjoint R@1",
    "cluster_accuracy": "clustering",
    "pointing": "pointing",
}

BySeed = dict[int, float | None]  # None where it cannot be measured


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        name: of the method or ablation.
        feature: chosen on the training images.
        looks: the patch weights that the pointing accuracy is measured with.
        numbers: of the trained teacher, by column (and "pointing_chance"), then by seed.
        start: of the same network before training, with the same feature.
        seconds_per_step: by seed.
    """

    name: str
    feature: str
    looks: str
    numbers: dict[str, BySeed]
    start: dict[str, BySeed]
    seconds_per_step: BySeed


class Difference(NamedTuple):
    """Mean of paired differences and its 95 % interval by Student's t; the interval is None for one seed."""

    mean: float
    low: float | None
    high: float | None


def known(values: BySeed) -> list[float]:
    """The values that are not None, by seed."""
    return [value for _, value in sorted(values.items()) if value is not None]


def difference(values: BySeed, others: BySeed) -> Difference | None:
    """values - others over the seeds that have both; None where there is none."""
    pairs = [values[seed] - others[seed] for seed in values if None not in (values[seed], others.get(seed))]
    if not pairs:
        return None
    mean = float(np.mean(pairs))
    if len(pairs) < 2:
        return Difference(mean, None, None)
    half = float(stats.t.ppf((1 + COVERAGE) / 2, len(pairs) - 1) * np.std(pairs, ddof=1) / math.sqrt(len(pairs)))
    return Difference(mean, mean - half, mean + half)


def compare(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Differences by row, by what it is compared with ("start", "baseline", "cmd"), by column.

    The baseline of a column is the one with the best mean. Baselines are compared with the start alone, ablations with cmd too.

    Returns:
        {"to": name of the other row, "mean", "low", "high"}, all None where nothing can be compared.
    """
    baselines = [row for row in rows if row.name in BASELINES]
    ours = [row for row in rows if row.name == OURS]
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for row in rows:
        others = {"start": [row._replace(name="start", numbers=row.start)]}
        if row.name not in BASELINES:
            others["baseline"] = baselines
        if row.name not in (*BASELINES, OURS):
            others[OURS] = ours
        found[row.name] = {
            kind: {column: _to_best(row, of_kind, column) for column in COLUMNS} for kind, of_kind in others.items()
        }
    return found


def _to_best(row: Row, others: Sequence[Row], column: str) -> dict[str, Any]:
    measured = [other for other in others if known(other.numbers[column])]
    if not measured:
        return dict.fromkeys(("to", *Difference._fields))
    best = max(measured, key=lambda other: np.mean(known(other.numbers[column])))
    paired = difference(row.numbers[column], best.numbers[column])
    return {"to": best.name, **(paired._asdict() if paired else dict.fromkeys(Difference._fields))}


def markdown(rows: Sequence[Row]) -> str:
    """The table of all rows and the tables of differences."""
    lines = [_line(row.name, row.numbers, row.looks, row.feature, row.seconds_per_step) for row in rows]
    lines = [_line("start", row.start, row.looks, row.feature, {}) for row in rows if row.name == OURS] + lines
    parts = [
        "Percent on the test images, mean ± standard deviation over seeds. The start is measured as the trained network of "
        f"{OURS}.",
        _table(["", *COLUMNS.values(), "chance", "points by", "feature", "s a step"], lines),
    ]
    differences = compare(rows)
    for kind, text in (
        ("baseline", "To the baseline with the best mean of the column"),
        ("start", "To the start, measured in the same way"),
        (OURS, f"To {OURS}"),
    ):
        cells = [
            [name, *(_difference(of_row[kind][column], kind == "baseline") for column in COLUMNS)]
            for name, of_row in differences.items()
            if kind in of_row
        ]
        if cells:
            parts.append(f"{text}: points, mean of the seeds' differences [95 % interval, Student's t].")
            parts.append(_table(["", *COLUMNS.values()], cells))
    return "\n\n".join(parts) + "\n"


def _line(name: str, numbers: dict[str, BySeed], looks: str, feature: str, seconds: BySeed) -> list[str]:
    chance, took = known(numbers["pointing_chance"]), known(seconds)
    columns = [_mean(known(numbers[column])) for column in COLUMNS]
    chances = [f"{np.mean(chance):.1f}", looks] if chance else ["n/a", "n/a"]
    return [name, *columns, *chances, feature, f"{np.mean(took):.3g}" if took else "n/a"]


def _mean(values: list[float]) -> str:
    if not values:
        return "n/a"
    return f"{np.mean(values):.1f} ± {'n/a' if len(values) < 2 else f'{np.std(values, ddof=1):.1f}'}"


def _difference(found: dict[str, Any], named: bool) -> str:
    if found["mean"] is None:
        return "n/a"
    interval = "n/a" if found["low"] is None else f"{found['low']:+.1f}, {found['high']:+.1f}"
    return f"{found['mean']:+.1f} [{interval}]" + (f" {found['to']}" if named else "")


def _table(head: list[str], lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    row = lambda cells: "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
    return "\n".join([row(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(row, lines)])


def seconds_per_step(run: Run) -> float | None:
    """Median over the log of the time that a step takes without evaluations; None of a log without it."""
    curve = read_curves(run.workdir).get("images_per_s")
    rates = [rate for rate in curve.values if rate] if curve else []
    return run.config.train.batch_size / float(np.median(rates)) if rates else None
