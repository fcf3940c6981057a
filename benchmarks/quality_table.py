"""Statistics over seeds, and the tables of `benchmarks.quality`."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

COVERAGE = 0.95
COLUMNS = {
    "linear": "linear top-1",
    "knn": "k-NN top-1",
    "rank1": "Rank-1",
    "map": "mAP",
    "pointing": "pointing",
}
# Points by which cmd is to be better, by column, and how often it is to point at a part where chance does so once.
TARGETS = {"rank1": {"baseline": 10.0, "start": 20.0}, "linear": {"baseline": 10.0, "start": 20.0}}
POINTING_TARGET = 3.0

BySeed = dict[int, float | None]  # a number of every seed; None where it cannot be measured


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        name: of the method or ablation.
        feature: chosen on the training images.
        looks: what the pointing accuracy is of.
        numbers: of the trained teacher: by column (and "pointing_chance"), then by seed.
        start: of the same network before training, random weights, with the same feature.
        seconds_per_step: by seed.
    """

    name: str
    feature: str
    looks: str
    numbers: dict[str, BySeed]
    start: dict[str, BySeed]
    seconds_per_step: BySeed


class Spread(NamedTuple):
    """Mean over seeds, and standard deviation; None of one seed."""

    mean: float
    sd: float | None
    seeds: int


class Difference(NamedTuple):
    """Mean of the seeds' paired differences, and its 95 % interval by Student's t; None of one seed."""

    mean: float
    low: float | None
    high: float | None


def spread(values: BySeed) -> Spread | None:
    """None where no seed has a number."""
    known = known_values(values)
    if not known:
        return None
    return Spread(float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None, len(known))


def difference(values: BySeed, others: BySeed) -> Difference | None:
    """values - others over the seeds that both have; None where there is none."""
    pairs = [values[seed] - others[seed] for seed in values if None not in (values[seed], others.get(seed))]
    if not pairs:
        return None
    mean = float(np.mean(pairs))
    if len(pairs) < 2:
        return Difference(mean, None, None)
    half = float(stats.t.ppf((1 + COVERAGE) / 2, len(pairs) - 1) * np.std(pairs, ddof=1) / math.sqrt(len(pairs)))
    return Difference(mean, mean - half, mean + half)


def known_values(values: BySeed) -> list[float]:
    """Those that are not None, by ascending seed."""
    return [value for _, value in sorted(values.items()) if value is not None]


def best_of(rows: Sequence[Row], column: str) -> Row | None:
    """The row with the best mean in a column; None where none has a number."""
    measured = [row for row in rows if known_values(row.numbers[column])]
    return max(measured, key=lambda row: spread(row.numbers[column]).mean, default=None)


def compare(rows: Sequence[Row], baselines: Sequence[str], ours: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Differences: by row, by what it is compared with ("baseline", "start", "cmd"), by column.

    The baseline of a column is the one with its best mean, which is on the baseline's side. Baselines are compared with the
    start alone, and ablations with ours too.

    Returns:
        {"to": name of the other row, "mean", "low", "high"}, the last three None where nothing can be compared.
    """
    by_name, found = {row.name: row for row in rows}, {}
    for row in rows:
        kinds = ["start"]
        if row.name not in baselines:
            kinds += ["baseline", ours] if row.name != ours else ["baseline"]
        found[row.name] = {kind: {} for kind in kinds}
        for kind in kinds:
            for column in COLUMNS:
                if kind == "start":
                    to, numbers = kind, row.start
                else:
                    others = [by_name[name] for name in (baselines if kind == "baseline" else [ours]) if name in by_name]
                    best = best_of(others, column)
                    to, numbers = (best.name, best.numbers) if best else (None, None)
                paired = difference(row.numbers[column], numbers[column]) if numbers else None
                values = paired._asdict() if paired else dict.fromkeys(Difference._fields)
                found[row.name][kind][column] = {"to": to, **values}
    return found


def targets(rows: Sequence[Row], differences: dict, baselines: Sequence[str], ours: str) -> list[dict[str, Any]]:
    """Whether what is claimed holds, by the means; without a baseline nothing is claimed of the better one.

    Returns:
        For each target its text, what it asks for, what was reached, and by how much it is missed (0 where it is met), all in
        points; None where it was not measured.
    """
    row = next((row for row in rows if row.name == ours), None)
    complete = {row.name for row in rows} >= set(baselines)
    found = []
    for column, asked in TARGETS.items():
        for kind, points in asked.items():
            measured = row and (complete or kind != "baseline")
            reached = differences[ours][kind][column]["mean"] if measured else None
            other = "the better baseline" if kind == "baseline" else "the start"
            found.append(_target(f"{COLUMNS[column]}: {points:g} points over {other}", points, reached))
    accuracy, chance = (spread(row.numbers[name]) if row else None for name in ("pointing", "pointing_chance"))
    asked = POINTING_TARGET * chance.mean if chance else None
    text = f"pointing: {POINTING_TARGET:g} times chance"
    return [*found, _target(text, asked, accuracy.mean if accuracy and chance else None)]


def _target(text: str, asked: float | None, reached: float | None) -> dict[str, Any]:
    missed = max(0.0, asked - reached) if asked is not None and reached is not None else None
    return {"target": text, "asked_points": asked, "reached_points": reached, "missed_by_points": missed}


def markdown(rows: Sequence[Row], baselines: Sequence[str], ours: str) -> str:
    """All tables."""
    differences = compare(rows, baselines, ours)
    head = ["", *COLUMNS.values(), "chance", "points by", "feature", "s a step"]
    lines = [_line(row.name, row.numbers, row.looks, row.feature, row.seconds_per_step) for row in rows]
    reference = next((row for row in rows if row.name == ours), None)
    if reference:
        lines.insert(0, _line("start", reference.start, reference.looks, reference.feature, {}))
    parts = [
        "Percent on the test images, mean ± standard deviation over seeds. The start (random weights) is measured as the "
        f"trained network of {ours}.",
        _table(head, lines),
    ]
    for kind, text in (
        ("baseline", "To the baseline with the best mean of the column"),
        ("start", "To the start, measured in the same way"),
        (ours, f"To {ours}"),
    ):
        chosen = {name: of_row[kind] for name, of_row in differences.items() if kind in of_row}
        if chosen:
            cells = [
                [name, *(_difference(of_kind[column], kind == "baseline") for column in COLUMNS)]
                for name, of_kind in chosen.items()
            ]
            parts += [
                f"{text}: points, mean of the seeds' differences [95 % interval, Student's t].",
                _table(["", *COLUMNS.values()], cells),
            ]
    met = targets(rows, differences, baselines, ours)
    parts.append("Targets, by the means:")
    parts.append("\n".join(f"- {one['target']}: {verdict(one)}" for one in met))
    return "\n\n".join(parts) + "\n"


def verdict(target: dict[str, Any]) -> str:
    """ "met", "missed by X" or "not measured", with what was reached."""
    if target["missed_by_points"] is None:
        return "not measured"
    state = f"missed by {target['missed_by_points']:.1f}" if target["missed_by_points"] else "met"
    return f"{state} ({target['reached_points']:.1f} of {target['asked_points']:.1f})"


def _line(name: str, numbers: dict[str, BySeed], looks: str, feature: str, seconds: BySeed) -> list[str]:
    chance, took = spread(numbers["pointing_chance"]), spread(seconds)
    return [
        name,
        *(_spread(spread(numbers[column])) for column in COLUMNS),
        f"{chance.mean:.1f}" if chance else "n/a",
        looks if chance else "n/a",
        feature,
        f"{took.mean:.3g}" if took else "n/a",
    ]


def _spread(found: Spread | None) -> str:
    if found is None:
        return "n/a"
    return f"{found.mean:.1f} ± {'n/a' if found.sd is None else f'{found.sd:.1f}'}"


def _difference(found: dict[str, Any], named: bool) -> str:
    if found["mean"] is None:
        return "n/a"
    interval = "n/a" if found["low"] is None else f"{found['low']:+.1f}, {found['high']:+.1f}"
    return f"{found['mean']:+.1f} [{interval}]" + (f" {found['to']}" if named else "")


def _table(head: list[str], lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    row = lambda cells: "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
    return "\n".join([row(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(row, lines)])
