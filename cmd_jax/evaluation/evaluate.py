"""The chosen protocols on one teacher: what `cmd_jax.eval` and the training loop call."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cmd_jax.config import ConfigDict
from cmd_jax.data.sources import Source, eval_section, where
from cmd_jax.errors import BadImage
from cmd_jax.evaluation import (
    clustering,
    disjoint_retrieval,
    few_shot,
    knn,
    label_free,
    labelling_effort,
    linear,
    logistic,
    pointing,
    retrieval,
)
from cmd_jax.evaluation.features import Features, extract_features
from cmd_jax.evaluation.protocol import Cost, EvalInputs, announced, forward_flops
from cmd_jax.evaluation.splits import Splits
from cmd_jax.inference.run import Encoder, batch_count
from cmd_jax.metrics import Metrics, Number
from cmd_jax.models.build import Params
from cmd_jax.models.network import Network


class Protocol(NamedTuple):
    """One of `eval.protocols`: what it costs, and its numbers."""

    cost: Callable[[EvalInputs], Cost]
    measure: Callable[[EvalInputs], list[Number]]


PROTOCOLS: dict[str, Protocol] = {
    "knn": Protocol(knn.cost, knn.measure),
    "retrieval": Protocol(retrieval.cost, retrieval.measure),
    "logistic": Protocol(logistic.cost, logistic.measure),
    "fractions": Protocol(logistic.cost_of_fractions, logistic.measure_fractions),
    "linear": Protocol(linear.cost, linear.measure),
    "clustering": Protocol(clustering.cost, clustering.measure),
    "few_shot": Protocol(few_shot.cost, few_shot.measure),
    "disjoint_retrieval": Protocol(disjoint_retrieval.cost, disjoint_retrieval.measure),
    "labelling_effort": Protocol(labelling_effort.cost, labelling_effort.measure),
    "pointing": Protocol(pointing.cost, pointing.measure),
    "label_free": Protocol(label_free.cost, label_free.measure),
}


class Evaluation(NamedTuple):
    """The metrics of a teacher, and what they were computed from.

    Attributes:
        metrics: all numbers.
        gallery: features of the training images.
        queries: features of the test images; None without labels.
        predictions: [Q] int64, the class that k-NN gives every test image; None without labels.
    """

    metrics: Metrics
    gallery: Features
    queries: Features | None
    predictions: np.ndarray | None


def protocols_at(config: ConfigDict, step: int, final: bool) -> tuple[str, ...]:
    """What training measures at a step: all of `eval.protocols` of its result, the slow probe not before."""
    if final:
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
    poll: Callable[[], None] = lambda: None,
    protocols: Sequence[str] | None = None,
) -> Evaluation:
    """Measures a teacher: test images against the training images, or without labels the training images alone.

    Args:
        config: resolved.
        network: of the teacher.
        teacher: parameters, on every device of this process.
        step: of the teacher.
        splits: of `open_splits`.
        poll: called before every batch and fit, in all processes equally often.
        protocols: keys of PROTOCOLS; None is `eval.protocols`. What the data does not allow is left out.
    """
    encoder = Encoder(config, network.backbone, teacher)
    queries = neighbours = None
    with announced("features", _feature_cost(config, teacher, splits), poll) as counting:
        gallery = extract_features(encoder, splits.train, counting)
        if splits.labelled():
            queries = extract_features(encoder, splits.test, counting)
    if queries is not None:  # whatever the protocols: the breakdown reads them too
        known, asked = gallery.features, queries.features
        with announced("neighbours", knn.neighbours_cost(known, asked), poll) as counting:
            neighbours = knn.nearest(known, asked, max(config.eval.knn_k), counting)
    readable = splits.select(gallery.indices, None if queries is None else queries.indices)
    left_out = {name: len(whole) - len(part) for name, whole, part in zip(Splits._fields, splits, readable, strict=True)}
    inputs = EvalInputs(config, network, teacher, readable, gallery, queries, neighbours, poll)
    chosen, numbers = measurable(config.eval.protocols if protocols is None else protocols, splits), []
    for name in [name for name in PROTOCOLS if name in chosen]:
        with announced(name, PROTOCOLS[name].cost(inputs), poll) as counting:
            numbers += PROTOCOLS[name].measure(inputs._replace(poll=counting))
    note = _left_out_note(left_out)
    numbers = [number._replace(protocol=number.protocol + note) for number in numbers]
    metrics = Metrics(step, data_name(config), numbers, {}, "", [], left_out, tuple(chosen))
    if queries is None:
        return Evaluation(metrics, gallery, None, None)
    k, names = knn.headline_k(config.eval.knn_k), splits.train.class_names
    found = knn.classify(inputs, k).predictions.astype(np.int64)
    of_class, pairs = (count(found, queries.labels, names) for count in (knn.per_class, knn.confusions))
    protocol = f"k-NN top-1, k={k}" if of_class else ""
    metrics = metrics._replace(per_class=of_class, per_class_protocol=protocol, confusions=pairs)
    return Evaluation(metrics, gallery, queries, found)


def _feature_cost(config: ConfigDict, teacher: Params, splits: Splits) -> Cost:
    images, side = sum(map(len, splits)), config.eval.crop_px
    calls = sum(batch_count(config, len(split)) for split in splits)
    return Cost(f"{images:,} images at {side} px", calls, "batches", forward_flops(config, teacher, images, side))


def data_name(config: ConfigDict) -> str:
    """What `evaluate` reads, for people."""
    return where(eval_section(config.data))
