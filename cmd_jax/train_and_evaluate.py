"""A whole training: the loop of `training.train`, with the data, initial weights, evaluations and report that it needs."""

import json
import os
from collections.abc import Callable, Mapping

import numpy as np

from cmd_jax import config as config_lib
from cmd_jax import files
from cmd_jax.config import BEST_METRICS, ConfigDict
from cmd_jax.data.sources import eval_section
from cmd_jax.datasets.prepared import open_source
from cmd_jax.errors import ConfigError, NoLabels
from cmd_jax.evaluation import evaluate as evaluation_lib
from cmd_jax.evaluation.splits import Splits, identify_splits, open_splits
from cmd_jax.metrics import load_all_metrics, load_metrics, outcome, save_metrics, table
from cmd_jax.models.build import Params
from cmd_jax.report.page import write_report
from cmd_jax.training import dry_run, processes
from cmd_jax.training import train as loop
from cmd_jax.training.preemption import Preemption
from cmd_jax.training.run import Run, prepare_run
from cmd_jax.training.sharding import local_copy
from cmd_jax.weights.transfer import follow_source, initial_weights


def prepare(config: ConfigDict, workdir: str | None = None) -> Run:
    """`training.run.prepare_run` with the data and the weights that the configuration names; prints what the weights are.

    Raises:
        ConfigError: a value cannot work.
        WeightsError: `init.weights` or the files beside them cannot be read.
    """

    def follow(config: ConfigDict) -> ConfigDict:
        config, line = follow_source(config)
        if line:
            processes.print_once(f"init: {line}")
        return config

    return prepare_run(config, open_source, workdir, follow)


def describe_run(config: ConfigDict, workdir: str | None = None) -> str:
    """What `--dry_run` prints; nothing is trained. Arguments and errors are those of `prepare`."""
    run = prepare(config, workdir)
    notes = initial_weights(run.config, run.network).notes if run.config.init.weights else ()
    return dry_run.summarize(run, open_source(eval_section(run.config.data), "test"), notes)


def train_and_evaluate(config: ConfigDict, workdir: str) -> None:
    """Trains to the end; called again, it goes on from the newest checkpoint. At the end it evaluates and writes the report.

    Args:
        config: as given, not resolved.
        workdir: where everything is written.

    Raises:
        ConfigError: before anything is written.
        WeightsError: `init.weights` cannot be read.
        Others: those of `training.train.train`.
    """
    with Preemption() as preemption:
        processes.assert_same_on_all_processes(configuration=json.loads(config.to_json()), workdir=workdir)
        run = prepare(config_lib.absolute_paths(config), workdir)
        splits, no_labels = open_splits(run.config)
        run = with_best_metric(run, no_labels)
        images = identify_splits(run.config, splits, run.source)
        if run.source.note:
            processes.print_once(f"train: {run.source.note}")
        if no_labels:
            processes.print_once(f"evaluation without labels: {no_labels}")
        elif splits.test.note:
            processes.print_once(f"test: {splits.test.note}")
        loop.train(run, workdir, images, evaluation_of(run, splits, workdir), preemption.poll, lambda: read_weights(run))


def with_best_metric(run: Run, no_labels: NoLabels | None) -> Run:
    """A run with the number by which its result is chosen: an open one where it starts from weights, so that it ends no worse.

    Args:
        run: of `prepare`.
        no_labels: why there are no labels; None: there are.

    Raises:
        ConfigError: `train.best_metric` needs labels.
    """
    config = run.config.copy_and_resolve_references()
    metric = config.train.best_metric
    if metric and BEST_METRICS[metric].labels and no_labels:
        raise ConfigError(f"train.best_metric is {metric!r}, but {no_labels}; or set it to eval_view_rank1") from no_labels
    if metric is None and config.init.weights:
        metric = "eval_view_rank1" if no_labels else "eval_train_rank1"
        if all(BEST_METRICS[metric].protocol in of for of in (config.eval.protocols, config.eval.protocols_between)):
            config.train.best_metric = metric
    return run._replace(config=config)


def read_weights(run: Run) -> Mapping[str, np.ndarray]:
    """The arrays of `init.weights`, if it is set; prints what is taken from there."""
    if not run.config.init.weights:
        return {}
    weights = initial_weights(run.config, run.network)
    notes = [*weights.notes, *([f"with the heads: {', '.join(weights.centers)}"] if weights.centers else [])]
    processes.print_once("\n".join(f"init: {note}" for note in notes))
    return weights.arrays | weights.centers


def evaluation_of(run: Run, splits: Splits, workdir: str) -> loop.Evaluate:
    """What the loop calls to evaluate a step of a run: prints the table and writes `eval/STEP/metrics.json`, and of the result
    the report. What was measured before, by a run that was interrupted, is not measured again."""

    def evaluate(
        step: int,
        teacher: Params,
        poll: Callable[[], None],
        before_write: Callable[[], None],
        write_line: Callable[[str], None],
        final: bool,
    ) -> Mapping[str, float]:
        config = run.config
        protocols = evaluation_lib.measurable(evaluation_lib.protocols_at(config, step, final), splits)
        if not protocols:
            return {}
        done = load_metrics(workdir, step)
        known = () if done is None else protocols if done.protocols is None else done.protocols
        missing = tuple(name for name in protocols if processes.broadcast_from_process_0(name not in known))
        reported = files.exists(os.path.join(workdir, "report", "index.html"))
        if not missing and (not final or processes.broadcast_from_process_0(reported)):
            return done.values() if done else {}
        teacher = local_copy(teacher, run.shardings)
        measured = evaluation_lib.evaluate(config, run.network, teacher, step, splits, poll, missing)
        metrics = measured.metrics.merged(done)
        if not processes.is_first():
            return metrics.values()
        before_write()
        start = config_lib.start_name(config)
        title = "teacher" if step else f"teacher at the start ({start})"
        before = load_metrics(workdir, 0) if step else None
        write_line(f"{title}:\n{table(metrics, before, start)}")
        if final:
            history = load_all_metrics(workdir) | {step: metrics}
            write_line(outcome(history, step, config.train.best_metric or "") or f"result: step {step}, the newest")
            for path in write_report(measured, config, run.network, teacher, splits, workdir):
                write_line(f"wrote {path}")
        save_metrics(measured.metrics, workdir)  # last: the file says that all of it is done
        return metrics.values()

    return evaluate
