"""All protocols on one teacher: what `cmd_jax.eval` and the training loop call."""

import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cmd_jax import files
from cmd_jax.config import ConfigDict, ConfigError, token_px
from cmd_jax.data.sources import Source, eval_section, open_source, where
from cmd_jax.evaluation.breakdown import Confusion, confusions
from cmd_jax.evaluation.features import Features, extract_features, make_extractor
from cmd_jax.evaluation.knn import knn_classify
from cmd_jax.evaluation.pointing import pointing
from cmd_jax.evaluation.retrieval import ratio_split, retrieval
from cmd_jax.models.network import Network
from cmd_jax.training.state import Params


class Row(NamedTuple):
    """One number: its key in metrics.json, title, value, how it was measured, unit, and 95 % interval if there is one."""

    key: str
    title: str
    value: float
    protocol: str
    unit: str = "percent"
    low: float | None = None
    high: float | None = None


class Evaluation(NamedTuple):
    """Everything measured on one teacher.

    Attributes:
        step: of the teacher.
        rows: the numbers.
        per_class: class name -> k-NN top-1 in percent.
        gallery: features of the training images.
        queries: features of the test images.
        confusions: pairs of classes, most confused first.
        predictions: [Q] int64, k-NN class of every test image.
    """

    step: int
    rows: list[Row]
    per_class: dict[str, float]
    confusions: list[Confusion]
    gallery: Features
    queries: Features
    predictions: np.ndarray

    def metrics(self) -> dict[str, float]:
        return {row.key: row.value for row in self.rows}


class NoLabels(ConfigError):
    """Data to train on, but not to evaluate on."""


class LabelledSplits(NamedTuple):
    """The gallery and the queries of an evaluation."""

    train: Source
    test: Source


def open_labelled_splits(config: ConfigDict) -> LabelledSplits:
    """Opens both splits of the data to evaluate on: `data.eval_source` and `data.eval_folder`, or the training data.

    Raises:
        NoLabels: the training data has no labels or no test images, and no other data is named.
        ConfigError, DatasetError: the other data cannot be used.
    """
    data = eval_section(config.data)
    train, test = (open_source(data, split) for split in ("train", "test"))
    named = config.data.eval_source or config.data.eval_folder
    refuse = ConfigError if named else NoLabels
    other = "" if named else ", or name labelled data: --config.data.eval_source=NAME or --config.data.eval_folder=DIR"
    if not train.class_names:
        raise refuse(f"{where(data)} has no labels; k-NN and retrieval need train/CLASS/* and test/CLASS/*{other}")
    if not len(test):
        raise refuse(f"{where(data)} has no test images; k-NN and retrieval need test/CLASS/* beside train/CLASS/*{other}")
    return LabelledSplits(train, test)


def evaluate(
    config: ConfigDict,
    network: Network,
    teacher: Params,
    step: int,
    splits: LabelledSplits,
    between: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Measures a teacher: test images as queries against the training images; calls `between` before every batch."""
    extract = make_extractor(config, network)
    gallery, queries = (extract_features(extract, teacher, split, config, between) for split in splits)
    classes, counts = (
        splits.train.class_names,
        f"{len(queries.labels):,} test queries, {len(gallery.labels):,} train images",
    )
    features = f"{config.eval.features} features at {config.eval.crop_px} px"
    rows = []
    for k in config.eval.knn_k:
        result = knn_classify(
            gallery.features,
            gallery.labels,
            queries.features,
            queries.labels,
            k=k,
            temp=config.eval.knn_temp,
            classes=len(classes),
        )
        protocol = f"k={k}, T={config.eval.knn_temp}, {features}, {counts}"
        rows.append(Row(f"knn{k}_top1", f"k-NN top-1 (k={k})", result.top1, f"{protocol}; chance {100 / len(classes):.1f}"))
        rows.append(Row(f"knn{k}_top5", f"k-NN top-5 (k={k})", result.top5, protocol))
    found = retrieval(gallery.features, gallery.labels, queries.features, queries.labels)
    protocol = f"cosine, {features}, {counts}"
    rows += [
        Row("rank1", "Retrieval Rank-1", found.rank1, protocol),
        Row("rank5", "Retrieval Rank-5", found.rank5, protocol),
        Row(
            "map_at_100",
            "Retrieval mAP@100",
            found.map_at_100,
            f"first 100 ranks, over the relevant found there, {protocol}",
        ),
        Row("map", "Retrieval mAP", found.map_full, f"whole ranking, {protocol}"),
    ]
    ratio_gallery, ratio_queries = ratio_split(gallery.features, gallery.labels, queries.features, queries.labels)
    found = retrieval(*ratio_gallery, *ratio_queries)
    protocol = (
        f"cosine, {features}, every ninth test image as query ({len(ratio_queries[1]):,}), the others in the gallery "
        f"({len(ratio_gallery[1]):,})"
    )
    rows += [
        Row("ratio_rank1", "Retrieval 1:8 Rank-1", found.rank1, protocol),
        Row("ratio_rank5", "Retrieval 1:8 Rank-5", found.rank5, protocol),
        Row("ratio_map_at_100", "Retrieval 1:8 mAP@100", found.map_at_100, protocol),
    ]
    if queries.boxes.shape[1]:
        point = pointing(queries.mil_weights, queries.boxes, token_px(config) / config.eval.crop_px)
        patches = f"{queries.mil_weights.shape[1]} patches, {len(queries.labels):,} test images"
        rows.append(
            Row(
                "pointing_accuracy",
                "MIL pointing accuracy",
                point.accuracy,
                f"most weighted patch on a part box, {patches}",
            )
        )
        rows.append(Row("pointing_chance", "MIL pointing chance", point.chance, f"a patch drawn at random, {patches}"))
    right = result.predictions == queries.labels
    per_class = {name: 100 * float(np.mean(right[queries.labels == label])) for label, name in enumerate(classes)}
    pairs = confusions(result.predictions, queries.labels, classes)
    return Evaluation(step, rows, per_class, pairs, gallery, queries, result.predictions)


def save(evaluation: Evaluation, config: ConfigDict, workdir: str) -> str:
    """Writes `eval/STEP/metrics.json` and returns its path."""
    directory = os.path.join(workdir, "eval", str(evaluation.step))
    files.make_directory(directory)
    path = os.path.join(directory, "metrics.json")
    k = config.eval.knn_k[-1]
    content: dict[str, Any] = {
        "step": evaluation.step,
        "metrics": evaluation.metrics(),
        "title": {row.key: row.title for row in evaluation.rows},
        "unit": {row.key: row.unit for row in evaluation.rows},
        "protocol": {row.key: row.protocol for row in evaluation.rows},
        "interval": {row.key: [row.low, row.high] for row in evaluation.rows if row.low is not None},
        "per_class_top1": {"protocol": f"k-NN top-1, k={k}", "percent": evaluation.per_class},
        "confusions": [
            {"class": p.true, "predicted": p.predicted, "count": p.count, "percent": p.percent} for p in evaluation.confusions
        ],
    }
    files.write(path, json.dumps(content, indent=2) + "\n")
    return path


def load_metrics(workdir: str, step: int) -> dict[str, float] | None:
    """The numbers that `save` wrote for a step, or None."""
    path = os.path.join(workdir, "eval", str(step), "metrics.json")
    return json.loads(files.read(path))["metrics"] if files.exists(path) else None


def table(evaluation: Evaluation, before: dict[str, float] | None = None) -> str:
    """The numbers as text, with the protocol beside each and, if given, the untrained teacher's numbers."""
    head = (
        f"{'percent':24}{'untrained':>11}{'step ' + str(evaluation.step):>13}  protocol"
        if before
        else f"{'percent':24}{'step ' + str(evaluation.step):>11}  protocol"
    )
    lines = [head]
    for row in evaluation.rows:
        numbers = f"{row.value:11.2f}" if before is None else f"{before[row.key]:11.2f}{row.value:13.2f}"
        lines.append(f"{row.title:24}{numbers}  {row.protocol}")
    return "\n".join(lines)


def class_table(evaluation: Evaluation) -> str:
    """Accuracy of every class, worst first."""
    ordered = sorted(evaluation.per_class.items(), key=lambda item: item[1])
    return "\n".join(["top-1 by class, percent"] + [f"  {value:6.1f}  {name}" for name, value in ordered])
