"""From a work directory to an evaluated teacher, without optimizer or student."""

import os
import re
from collections.abc import Callable, Sequence

import jax

from cmd_jax import config as config_lib
from cmd_jax import metrics as metrics_lib
from cmd_jax.config import ConfigDict, validate
from cmd_jax.data import identity
from cmd_jax.data.sources import eval_section
from cmd_jax.errors import ConfigError, NoLabels
from cmd_jax.evaluation import evaluate as evaluation_lib
from cmd_jax.evaluation import knn, label_free
from cmd_jax.evaluation.splits import Splits, identify_splits, open_splits
from cmd_jax.models.build import init_params, make_network
from cmd_jax.training import processes
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.sharding import all_hardware, data_parallel, local_copy

MAX_NAME = 100  # characters of the folder for other data; those of its end say most


def evaluate_run(
    workdir: str,
    step: int | None,
    best: bool = False,
    protocols: Sequence[str] | None = None,
    source: str | None = None,
    folder: str | None = None,
    write_report: Callable[..., list[str]] | None = None,
) -> evaluation_lib.Evaluation:
    """Restores a teacher, measures it, prints the tables and writes the numbers.

    Args:
        workdir: of a run.
        step: of the checkpoint; None is the result: the best by `train.best_metric`, or the newest.
        best: take the best step by the run's `train.best_metric`.
        protocols: what is measured, in the place of the run's `eval.protocols`.
        source: labelled data in the place of the run's, as `data.source`.
        folder: the same, as `data.folder`. If its images are those of the run, which may have been moved, it is the run's own
            data.
        write_report: `report.page.write_report`, called for the run's own data; None: no report.

    Raises:
        CheckpointError: there is no such step, or it does not fit config.json.
        ConfigError: the data does not allow any of the protocols, or is not that of the run any more; a value of config.json or
            of these cannot work; or `best` is asked of a run without `train.best_metric`.
    """
    processes.assert_same_on_all_processes(
        workdir=workdir, step=step, best=best, protocols=protocols, source=source, folder=folder
    )
    config = config_lib.load(os.path.join(workdir, "config.json"))
    validate(config)  # it may have been edited
    config = config_lib.resolve(config, train_images=0)  # keys that an older version did not know
    if best and config.train.best_metric is None:
        raise ConfigError(f"--best needs a run with train.best_metric, and {workdir} has none; use --step or the newest")
    config, splits, reason, other = _open_data(config, workdir, source, folder)
    if protocols is not None:  # train.best_metric needs its protocol in training alone
        config.eval.protocols = tuple(protocols)
        config_lib.check_values(config)
    if not evaluation_lib.measurable(config.eval.protocols, splits):
        lacks = reason or f"{evaluation_lib.data_name(config)} has no part boxes"
        raise ConfigError(f"cannot measure {', '.join(config.eval.protocols)}: {lacks}; or choose --protocols=label_free")
    config = config_lib.for_inference(config, all_hardware())
    network = make_network(config)
    everywhere = data_parallel(jax.devices())
    shapes = jax.eval_shape(lambda: init_params(config, network))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere.replicated), shapes)
    checkpoints = Checkpoints(workdir, best_metric=config.train.best_metric, read_only=True)
    step, teacher = checkpoints.restore_teacher(abstract, step, best)
    is_result = step == checkpoints.result_step()
    checkpoints.close()
    if reason and processes.is_first():
        print(f"without labels: {reason}")
    teacher = local_copy(teacher, everywhere)
    evaluation = evaluation_lib.evaluate(config, network, teacher, step, splits)
    if not processes.is_first():
        return evaluation
    metrics = evaluation.metrics
    before = metrics_lib.load_metrics(workdir, 0, other) if step else None
    print(metrics_lib.table(metrics, before, config_lib.start_name(config)))
    if metrics.per_class:
        print(metrics_lib.class_table(metrics))
        print(metrics_lib.confusion_table(metrics))
    print(f"wrote {metrics_lib.save_metrics(metrics, workdir, other)}")
    if not other:
        history = metrics_lib.load_all_metrics(workdir)
        agreement = label_free.agreement(list(history.values()), f"knn{knn.headline_k(config.eval.knn_k)}_top1")
        outcome = metrics_lib.outcome(history, step, config.train.best_metric or "") if is_result else None
        print(*filter(None, (agreement, outcome)), sep="\n", end="\n" if agreement or outcome else "")
    for path in [] if other or write_report is None else write_report(evaluation, config, network, teacher, splits, workdir):
        print(f"wrote {path}")
    return evaluation


def _open_data(
    config: ConfigDict, workdir: str, source: str | None, folder: str | None
) -> tuple[ConfigDict, Splits, NoLabels | None, str | None]:
    """Opens what is evaluated on.

    Returns:
        The configuration with this data, its splits, why there are no labels, and the name of the folder for its numbers, None
        for the run's own data.
    """
    knows_images = identity.is_recorded(workdir)
    named = bool(config.data.eval_source or config.data.eval_folder)
    key = "data.eval_folder" if named else "data.folder"
    if not source and not folder:
        own = eval_section(config.data)
        if own.source == "folder" and not os.path.isdir(os.path.expanduser(own.folder)):
            relative = "" if os.path.isabs(own.folder) else f" in {os.getcwd()} (earlier versions stored relative paths)"
            raise ConfigError(
                f"{key} in {workdir}/config.json is {own.folder!r}, but there is no such directory{relative}; if the images "
                f"are elsewhere, run python -m cmd_jax.eval --workdir={workdir} --folder=DIR"
            )
        splits, reason = open_splits(config)
        changed = _differences(config, workdir, splits) if knows_images else []
        if changed:
            raise ConfigError(
                f"{workdir} was trained and measured with other images: {'; '.join(changed)}; restore the images, or pass "
                f"--folder=DIR to keep the numbers of these images apart"
            )
        return config, splits, reason, None
    other = config.copy_and_resolve_references()
    other.data.eval_source, other.data.eval_folder = source, folder
    validate(other)
    if knows_images:
        moved = other if named else config.copy_and_resolve_references()
        if not named:
            moved.data.source, moved.data.folder = source or "folder", folder
        splits, reason = open_splits(moved)
        if not _differences(moved, workdir, splits):
            return moved, splits, reason, None
    splits, reason = open_splits(other)
    name = evaluation_lib.data_name(other)
    if not knows_images and name == evaluation_lib.data_name(config):
        return other, splits, reason, None
    return other, splits, reason, "on_" + re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_")[-MAX_NAME:]


def _differences(config: ConfigDict, workdir: str, splits: Splits) -> list[str]:
    """Between the images of a run and those that an evaluation would read."""
    images = identify_splits(config, splits)
    processes.assert_same_on_all_processes(**identity.brief(images))
    return identity.differences(workdir, images, () if "train" in images else ("train",))
