"""From a work directory to an evaluated teacher, without optimizer or student."""

import os

import jax

from cmd_jax import config as config_lib
from cmd_jax.config import ConfigError
from cmd_jax.evaluation import evaluate as evaluation_lib
from cmd_jax.report.page import write_report
from cmd_jax.training import processes
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.sharding import data_parallel, local_copy
from cmd_jax.training.state import init_params, make_network
from cmd_jax.validation import validate


def evaluate_run(workdir: str, step: int | None, best: bool = False) -> evaluation_lib.Evaluation:
    """Restores a teacher, measures it, prints the tables and writes numbers and report.

    Args:
        workdir: of a run.
        step: of the checkpoint; None is the newest.
        best: take the best step by the run's `train.best_metric`.

    Raises:
        CheckpointError: there is no such step, or it does not fit config.json.
        ConfigError: the data has no labels or no test split, config.json has a value that cannot work, or `best` is asked of a
            run without `train.best_metric`.
    """
    processes.agree(workdir=workdir, step=step, best=best)
    config = config_lib.load(os.path.join(workdir, "config.json"))
    validate(config)  # it may have been edited
    if best and config.train.best_metric is None:
        raise ConfigError(f"--best needs a run with train.best_metric, and {workdir} has none; use --step or the newest")
    splits = evaluation_lib.open_labelled_splits(config)
    network = make_network(config)
    everywhere = data_parallel(jax.devices())
    shapes = jax.eval_shape(lambda: init_params(config, network))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere.replicated), shapes)
    checkpoints = Checkpoints(workdir, best_metric=config.train.best_metric, read_only=True)
    step, teacher = checkpoints.restore_teacher(abstract, step, best)
    checkpoints.close()
    teacher = local_copy(teacher, everywhere)
    evaluation = evaluation_lib.evaluate(config, network, teacher, step, splits)
    if not processes.is_first():
        return evaluation
    print(evaluation_lib.table(evaluation, evaluation_lib.load_metrics(workdir, 0)))
    print(evaluation_lib.class_table(evaluation))
    print(f"wrote {evaluation_lib.save(evaluation, config, workdir)}")
    for path in write_report(evaluation, config, network, teacher, splits, workdir):
        print(f"wrote {path}")
    return evaluation
