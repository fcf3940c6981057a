"""The metrics of one evaluation: what the log, the printed table, `eval/STEP/metrics.json`, report and model card read."""

import json
import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from cmd_jax import files
from cmd_jax.errors import DatasetError
from cmd_jax.text import printable


class Number(NamedTuple):
    """One number.

    Attributes:
        key: in metrics.json.
        title: for people.
        value: the number; None where a file holds none.
        protocol: how it was measured.
        unit: "percent", or "" for a number without one.
        low: lower end of its 95 % interval; None where none is computed.
        high: upper end.
    """

    key: str
    title: str
    value: float | None
    protocol: str
    unit: Literal["percent", ""] = "percent"
    low: float | None = None
    high: float | None = None


class Confusion(NamedTuple):
    """Test images of one class that were taken for another.

    Attributes:
        true: the class.
        predicted: the other.
        count: of images.
        percent: of the test images of the class.
    """

    true: str
    predicted: str
    count: int
    percent: float


class Metrics(NamedTuple):
    """Everything measured on the teacher of one step.

    Attributes:
        step: of the teacher.
        data: what was evaluated on, for people.
        numbers: in the order of the table.
        per_class: class name -> top-1 in percent; empty without labels.
        per_class_protocol: how that was measured; "" without labels.
        confusions: pairs of classes that are confused, most often first.
        left_out: split -> number of its images that could not be read, and are in none of the numbers.
        protocols: names of those that were measured; None in a file of an earlier version, which does not say.
    """

    step: int
    data: str
    numbers: list[Number]
    per_class: Mapping[str, float]
    per_class_protocol: str
    confusions: list[Confusion]
    left_out: Mapping[str, int]
    protocols: tuple[str, ...] | None = ()

    def values(self) -> dict[str, float | None]:
        """The numbers by key."""
        return {number.key: number.value for number in self.numbers}

    def merged(self, earlier: "Metrics | None") -> "Metrics":
        """The same with the numbers of an earlier evaluation of the step that were not measured again."""
        if earlier is None:
            return self
        numbers = {number.key: number for number in (*earlier.numbers, *self.numbers)}
        known = None not in (earlier.protocols, self.protocols)
        protocols = tuple(dict.fromkeys((*earlier.protocols, *self.protocols))) if known else None
        return self._replace(numbers=[*numbers.values()], protocols=protocols)

    def to_json(self) -> dict[str, Any]:
        """Content of metrics.json."""
        field = lambda name: {number.key: getattr(number, name) for number in self.numbers}
        return {
            "step": self.step,
            "data": self.data,
            "images_left_out": dict(self.left_out),
            "protocols": None if self.protocols is None else list(self.protocols),
            "metrics": field("value"),
            "title": field("title"),
            "unit": field("unit"),
            "protocol": field("protocol"),
            "interval": {number.key: [number.low, number.high] for number in self.numbers if number.low is not None},
            "per_class_top1": {"protocol": self.per_class_protocol, "percent": dict(self.per_class)},
            "confusions": [
                {"class": pair.true, "predicted": pair.predicted, "count": pair.count, "percent": pair.percent}
                for pair in self.confusions
            ],
        }

    @classmethod
    def from_json(cls, content: dict[str, Any], step: int) -> "Metrics":
        """The metrics of a step from `to_json`, or from an earlier version, which wrote fewer parts."""
        titles, units, intervals = (content.get(part, {}) for part in ("title", "unit", "interval"))
        protocols, per_class = content.get("protocol"), content.get("per_class_top1", {})
        numbers = []
        for key, value in content["metrics"].items():
            low, high = intervals.get(key, (None, None))
            protocol = "" if protocols is None else str(protocols[key])
            value = None if value is None else float(value)
            numbers.append(Number(key, str(titles.get(key, key)), value, protocol, units.get(key, "percent"), low, high))
        measured = content.get("protocols")
        pairs = [
            Confusion(*(pair[key] for key in ("class", "predicted", "count", "percent")))
            for pair in content.get("confusions", [])
        ]
        return cls(
            step,
            content.get("data", ""),
            numbers,
            per_class.get("percent", {}),
            per_class.get("protocol", ""),
            pairs,
            content.get("images_left_out", {}),
            None if measured is None else tuple(measured),
        )


def metrics_path(workdir: str, step: int, other: str | None = None) -> str:
    """Where the metrics of a step are kept; `other` is the folder of those on other data than the run's."""
    return os.path.join(workdir, "eval", str(step), *([other] if other else []), "metrics.json")


def save_metrics(metrics: Metrics, workdir: str, other: str | None = None) -> str:
    """Writes `eval/STEP/metrics.json` and returns its path; numbers of protocols that were measured earlier are kept in it."""
    path = metrics_path(workdir, metrics.step, other)
    files.make_directory(os.path.dirname(path))
    whole = metrics.merged(load_metrics(workdir, metrics.step, other))
    files.write(path, json.dumps(whole.to_json(), indent=2) + "\n")
    return path


def load_metrics(workdir: str, step: int, other: str | None = None) -> Metrics | None:
    """The metrics that `save_metrics` wrote for a step, or None.

    Raises:
        DatasetError: the file is damaged.
    """
    path = metrics_path(workdir, step, other)
    if not files.exists(path):
        return None
    try:
        return Metrics.from_json(json.loads(files.read(path)), step)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path} is damaged ({type(error).__name__}: {error}); evaluate again: cmd_jax.eval") from error


def load_all_metrics(workdir: str) -> dict[int, Metrics]:
    """The metrics of every evaluated step of a run, by step. Raises DatasetError as `load_metrics`."""
    steps = sorted(int(name) for name in files.names(os.path.join(workdir, "eval")) if name.isdecimal())
    return {step: found for step in steps if (found := load_metrics(workdir, step))}


def table(metrics: Metrics, before: Metrics | None = None, start: str = "") -> str:
    """The numbers as text, each with its 95 % interval and protocol.

    Args:
        metrics: of a step.
        before: those at the start of the run, for a column beside them; None: no such column.
        start: what the run starts from (`config.start_name`), said below that column.
    """
    lines, unit = [], None
    old = {} if before is None else before.values()
    for number in metrics.numbers:
        if number.unit != unit:
            unit = number.unit
            head = "" if before is None else f"{'start':>11}"
            lines.append(f"{unit or 'label-free':24}{head}{'step ' + str(metrics.step):>11}{'':16}protocol")
        write = (lambda value: f"{value:.1f}") if unit else (lambda value: f"{value:.4g}")
        earlier = "" if before is None else f"{write(old[number.key]) if number.key in old else '-':>11}"
        spread = "" if number.low is None else f" [{write(number.low)}, {write(number.high)}]"
        lines.append(f"{number.title:24}{earlier}{write(number.value):>11}{spread:16}{number.protocol}")
    return "\n".join(lines if before is None else [*lines, f"start: {printable(start)}"])


def outcome(history: Mapping[int, Metrics], result: int, best_metric: str) -> str | None:
    """Whether training helped, by the number that chose the result of a run, in one line; None where no evaluation measures it.

    Args:
        history: metrics of every evaluated step.
        result: the best step.
        best_metric: `train.best_metric`.
    """
    key = best_metric.removeprefix("eval_")
    found = {step: number for step, metrics in history.items() for number in metrics.numbers if number.key == key}
    if result not in found or best_metric == key:
        return None
    values = {step: f"{number.value:.1f}" for step, number in sorted(found.items())}
    chosen = f"chosen by {found[result].title}"
    trained = ", ".join(f"{value} at step {step}" for step, value in values.items() if step)
    if result == 0:
        return f"result: the start, {chosen} ({values[0]}{f'; {trained}' if trained else ''}): training did not help"
    if 0 not in values:
        return f"result: step {result}, {chosen} ({trained})"
    return f"result: step {result}, {chosen} ({values[0]} at the start, {trained}): training helped"


def class_table(metrics: Metrics) -> str:
    """Accuracy of every class as text, worst first."""
    ordered = sorted(metrics.per_class.items(), key=lambda item: item[1])
    return "\n".join(["top-1 by class, percent"] + [f"  {value:6.1f}  {name}" for name, value in ordered])


def confusion_table(metrics: Metrics, lines: int = 10) -> str:
    """The first confused pairs as text."""
    head = "most confused: images, percent of the class, class -> prediction"
    pairs = metrics.confusions[:lines]
    return "\n".join([head] + [f"  {p.count:4}  {p.percent:5.1f}  {p.true} -> {p.predicted}" for p in pairs])
