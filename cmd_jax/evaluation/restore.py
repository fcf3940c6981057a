"""From a work directory to an evaluated teacher, without optimizer or student."""

import os
import re
from collections.abc import Sequence

import jax

from cmd_jax import config as config_lib
from cmd_jax.config import ConfigError
from cmd_jax.evaluation import breakdown
from cmd_jax.evaluation import evaluate as evaluation_lib
from cmd_jax.evaluation.splits import open_splits
from cmd_jax.report.page import write_report
from cmd_jax.training import processes
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.sharding import data_parallel, local_copy
from cmd_jax.training.state import init_params, make_network
from cmd_jax.validation import validate

MAX_NAME = 100  # characters of the folder for other data; those of its end say most


def evaluate_run(
    workdir: str,
    step: int | None,
    best: bool = False,
    protocols: Sequence[str] | None = None,
    source: str | None = None,
    folder: str | None = None,
) -> evaluation_lib.Evaluation:
    """Restores a teacher, measures it, prints the tables and writes the numbers, and the report of the run's own data.

    Args:
        workdir: of a run.
        step: of the checkpoint; None is the newest.
        best: take the best step by the run's `train.best_metric`.
        protocols: what is measured, in the place of the run's `eval.protocols`.
        source: other labelled data, in the place of the run's `data.eval_source`.
        folder: the same, in the place of the run's `data.eval_folder`.

    Raises:
        CheckpointError: there is no such step, or it does not fit config.json.
        ConfigError: the data does not allow any of the protocols, a value of config.json or of these cannot work, or `best`
            is asked of a run without `train.best_metric`.
    """
    processes.agree(workdir=workdir, step=step, best=best, protocols=protocols, source=source, folder=folder)
    config = config_lib.load(os.path.join(workdir, "config.json"))
    validate(config)  # it may have been edited
    own_data = evaluation_lib.data_name(config)
    if protocols is not None:
        config.eval.protocols = tuple(protocols)
    if source or folder:
        config.data.eval_source, config.data.eval_folder = source, folder
    validate(config)
    config = config_lib.resolve(config, train_images=0)  # keys that an older version did not know
    if best and config.train.best_metric is None:
        raise ConfigError(f"--best needs a run with train.best_metric, and {workdir} has none; use --step or the newest")
    splits, reason = open_splits(config)
    data = evaluation_lib.data_name(config)
    if not evaluation_lib.measurable(config.eval.protocols, splits):
        lacks = reason or f"{data} has no part boxes"
        raise ConfigError(f"cannot measure {', '.join(config.eval.protocols)}: {lacks}; or choose --protocols=label_free")
    other = None if data == own_data else "on_" + re.sub(r"[^A-Za-z0-9.-]+", "_", data).strip("_")[-MAX_NAME:]
    network = make_network(config)
    everywhere = data_parallel(jax.devices())
    shapes = jax.eval_shape(lambda: init_params(config, network))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere.replicated), shapes)
    checkpoints = Checkpoints(workdir, best_metric=config.train.best_metric, read_only=True)
    step, teacher = checkpoints.restore_teacher(abstract, step, best)
    checkpoints.close()
    if reason and processes.is_first():
        print(f"without labels: {reason}")
    teacher = local_copy(teacher, everywhere)
    evaluation = evaluation_lib.evaluate(config, network, teacher, step, splits)
    if not processes.is_first():
        return evaluation
    print(evaluation_lib.table(evaluation, evaluation_lib.load_metrics(workdir, 0, other) if step else None))
    if evaluation.per_class:
        print(breakdown.class_table(evaluation.per_class))
        print(breakdown.confusion_table(evaluation.confusions))
    print(f"wrote {evaluation_lib.save(evaluation, config, workdir, other)}")
    agreement = None if other else evaluation_lib.agreement_text(workdir, config)
    if agreement:
        print(agreement)
    for path in [] if other else write_report(evaluation, config, network, teacher, splits, workdir):
        print(f"wrote {path}")
    return evaluation
