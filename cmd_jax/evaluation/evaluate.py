"""The chosen protocols on one teacher: what `cmd_jax.eval` and the training loop call."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from cmd_jax import files
from cmd_jax.config import ConfigDict
from cmd_jax.data.sources import Source, eval_section, where
from cmd_jax.errors import BadImage
from cmd_jax.evaluation import agreement, breakdown, knn, label_free, linear, logistic, pointing, retrieval
from cmd_jax.evaluation.announce import announced, forward_flops
from cmd_jax.evaluation.breakdown import Confusion
from cmd_jax.evaluation.features import Features, extract_features
from cmd_jax.evaluation.protocol import Cost, EvalInputs, Row
from cmd_jax.evaluation.splits import Splits
from cmd_jax.inference.run import Encoder, batch_count
from cmd_jax.models.build import Params
from cmd_jax.models.network import Network
from cmd_jax.text import printable


class Protocol(NamedTuple):
    """One of `eval.protocols`: what it costs, and its numbers."""

    cost: Callable[[EvalInputs], Cost]
    rows: Callable[[EvalInputs], list[Row]]


PROTOCOLS: dict[str, Protocol] = {
    "knn": Protocol(knn.cost, knn.rows),
    "retrieval": Protocol(retrieval.cost, retrieval.rows),
    "logistic": Protocol(logistic.cost, logistic.rows),
    "fractions": Protocol(logistic.fraction_cost, logistic.fraction_rows),
    "linear": Protocol(linear.cost, linear.rows),
    "pointing": Protocol(pointing.cost, pointing.rows),
    "label_free": Protocol(label_free.cost, label_free.rows),
}


class Evaluation(NamedTuple):
    """Everything measured on one teacher.

    Attributes:
        step: of the teacher.
        rows: the numbers.
        per_class: class name -> k-NN top-1 in percent; empty without labels, as the two below are empty and None.
        confusions: pairs of classes that k-NN confuses, most often first.
        gallery: features of the training images.
        queries: features of the test images; None without labels.
        predictions: [Q] int64, the class that k-NN gives every test image.
        left_out: split -> number of its images that could not be read, and are in none of the numbers.
    """

    step: int
    rows: list[Row]
    per_class: dict[str, float]
    confusions: list[Confusion]
    gallery: Features
    queries: Features | None
    predictions: np.ndarray | None
    left_out: Mapping[str, int] = MappingProxyType({"train": 0, "test": 0})

    def metrics(self) -> dict[str, float]:
        return {row.key: row.value for row in self.rows}


def protocols_at(config: ConfigDict, step: int, steps: int) -> tuple[str, ...]:
    """What training measures at a step of `steps`: all of `eval.protocols` at its end, the slow probe not before."""
    if step == steps:
        return tuple(config.eval.protocols)
    if step == 0:
        return tuple(name for name in config.eval.protocols if name != "linear")
    return tuple(config.eval.protocols_between)


def measurable(protocols: Sequence[str], splits: Splits) -> tuple[str, ...]:
    """Those protocols that the data allows: without labels "label_free" alone, without part boxes no "pointing"."""
    if not splits.labelled():
        return tuple(name for name in protocols if name == "label_free")
    return tuple(name for name in protocols if name != "pointing" or _has_boxes(splits.test))


def _has_boxes(source: Source) -> bool:
    try:
        return len(source[0].part_boxes) > 0
    except BadImage:  # a file that cannot be read, and folders have no boxes
        return False


def _left_out_note(left_out: Mapping[str, int]) -> str:
    """For the protocol of every number; "" where all images could be read."""
    parts = [f"{count:,} {split}" for split, count in left_out.items() if count]
    return f"; left out as unreadable: {', '.join(parts)}" if parts else ""


def evaluate(
    config: ConfigDict,
    network: Network,
    teacher: Params,
    step: int,
    splits: Splits,
    between: Callable[[], None] = lambda: None,
    protocols: Sequence[str] | None = None,
) -> Evaluation:
    """Measures a teacher: test images against the training images, or without labels the training images alone.

    Args:
        config: resolved.
        network: of the teacher.
        teacher: parameters, on every device of this process.
        step: of the teacher.
        splits: of `open_splits`.
        between: called before every batch and fit, in all processes equally often.
        protocols: keys of PROTOCOLS; None is `eval.protocols`. What the data does not allow is left out.
    """
    encoder = Encoder(config, network.backbone, teacher)
    queries = neighbours = None
    with announced("features", _feature_cost(config, teacher, splits), between) as counting:
        gallery = extract_features(encoder, splits.train, counting)
        if splits.labelled():
            queries = extract_features(encoder, splits.test, counting)
    if queries is not None:  # whatever the protocols: the breakdown reads them too
        known, asked = gallery.features, queries.features
        with announced("neighbours", knn.neighbours_cost(known, asked), between) as counting:
            neighbours = knn.nearest(known, asked, max(config.eval.knn_k), counting)
    readable = splits.select(gallery.indices, None if queries is None else queries.indices)
    left_out = {name: len(whole) - len(part) for name, whole, part in zip(Splits._fields, splits, readable, strict=True)}
    inputs = EvalInputs(config, network, teacher, readable, gallery, queries, neighbours, between)
    chosen, rows = measurable(config.eval.protocols if protocols is None else protocols, splits), []
    for name in [name for name in PROTOCOLS if name in chosen]:
        with announced(name, PROTOCOLS[name].cost(inputs), between) as counting:
            rows += PROTOCOLS[name].rows(inputs._replace(between=counting))
    rows = [row._replace(protocol=row.protocol + _left_out_note(left_out)) for row in rows]
    if queries is None:
        return Evaluation(step, rows, {}, [], gallery, None, None, left_out)
    found = knn.classify(inputs, knn.headline_k(config.eval.knn_k)).predictions.astype(np.int64)
    names = splits.train.class_names
    of_class, pairs = (count(found, queries.labels, names) for count in (breakdown.per_class, breakdown.confusions))
    return Evaluation(step, rows, of_class, pairs, gallery, queries, found, left_out)


def _feature_cost(config: ConfigDict, teacher: Params, splits: Splits) -> Cost:
    images, side = sum(map(len, splits)), config.eval.crop_px
    calls = sum(batch_count(config, len(split)) for split in splits)
    return Cost(f"{images:,} images at {side} px", calls, "batches", forward_flops(config, teacher, images, side))


def data_name(config: ConfigDict) -> str:
    """What `evaluate` reads, for people."""
    return where(eval_section(config.data))


def metrics_path(workdir: str, step: int, other: str | None = None) -> str:
    """Where the numbers of a step are kept; `other` is the folder of those on other data than the run's."""
    return os.path.join(workdir, "eval", str(step), *([other] if other else []), "metrics.json")


def save(evaluation: Evaluation, config: ConfigDict, workdir: str, other: str | None = None) -> str:
    """Writes `eval/STEP/metrics.json` and returns its path; numbers of protocols that were measured earlier are kept in it."""
    path, rows = metrics_path(workdir, evaluation.step, other), evaluation.rows
    files.make_directory(os.path.dirname(path))
    content: dict[str, Any] = {
        "step": evaluation.step,
        "data": data_name(config),
        "images_left_out": dict(evaluation.left_out),
        "metrics": evaluation.metrics(),
        "title": {row.key: row.title for row in rows},
        "unit": {row.key: row.unit for row in rows},
        "protocol": {row.key: row.protocol for row in rows},
        "interval": {row.key: [row.low, row.high] for row in rows if row.low is not None},
        "per_class_top1": {
            "protocol": f"k-NN top-1, k={knn.headline_k(config.eval.knn_k)}" if evaluation.per_class else "",
            "percent": evaluation.per_class,
        },
        "confusions": [
            {"class": pair.true, "predicted": pair.predicted, "count": pair.count, "percent": pair.percent}
            for pair in evaluation.confusions
        ],
    }
    earlier = json.loads(files.read(path)) if files.exists(path) else {}
    for part in ("metrics", "title", "unit", "protocol", "interval"):
        content[part] = {**earlier.get(part, {}), **content[part]}
    files.write(path, json.dumps(content, indent=2) + "\n")
    return path


def load_metrics(workdir: str, step: int, other: str | None = None) -> dict[str, float] | None:
    """The numbers that `save` wrote for a step, or None."""
    path = metrics_path(workdir, step, other)
    return json.loads(files.read(path))["metrics"] if files.exists(path) else None


def table(evaluation: Evaluation, before: dict[str, float] | None = None, start: str = "") -> str:
    """The numbers as text, each with its 95 % interval and protocol.

    Args:
        evaluation: of a teacher.
        before: numbers at the start of the run, by key, for a column beside them; None: no such column.
        start: what the run starts from (`config.start_name`), said below that column.
    """
    lines, unit = [], None
    for row in evaluation.rows:
        if row.unit != unit:
            unit = row.unit
            head = "" if before is None else f"{'start':>11}"
            lines.append(f"{unit or 'label-free':24}{head}{'step ' + str(evaluation.step):>11}{'':16}protocol")
        write = (lambda value: f"{value:.1f}") if unit else (lambda value: f"{value:.4g}")
        earlier = "" if before is None else f"{write(before[row.key]) if row.key in before else '-':>11}"
        spread = "" if row.low is None else f" [{write(row.low)}, {write(row.high)}]"
        lines.append(f"{row.title:24}{earlier}{write(row.value):>11}{spread:16}{row.protocol}")
    return "\n".join(lines if before is None else [*lines, f"start: {printable(start)}"])


def agreement_text(workdir: str, config: ConfigDict) -> str | None:
    """How well the label-free numbers order the evaluated steps of a run, or None where there are too few."""
    of = f"knn{knn.headline_k(config.eval.knn_k)}_top1"
    history = [load_metrics(workdir, step) or {} for step in agreement.evaluated_steps(workdir)]
    found = agreement.rank_correlations(history, of)
    return agreement.text(found, of) if found else None
