"""Trains a configuration to its end in a work directory; called again, it goes on from the newest checkpoint."""

import errno
import functools
import json
import math
import os

import jax

from cmd_jax import config as config_lib
from cmd_jax.config import ConfigDict
from cmd_jax.data import identity
from cmd_jax.data.identity import Split
from cmd_jax.data.loader import CanvasCache, Prefetch, batches
from cmd_jax.errors import Collapsed, ConfigError, NoLabels, Preempted, SaveError
from cmd_jax.evaluation import evaluate as evaluation_lib
from cmd_jax.evaluation.splits import Splits, identify_splits, open_splits
from cmd_jax.report.page import write_report
from cmd_jax.training import processes
from cmd_jax.training.checkpoint import Checkpoints, compile_fingerprints, free_space
from cmd_jax.training.health import CollapseWatch, read_bad_step, watched_from
from cmd_jax.training.lock import Lock, hold
from cmd_jax.training.metrics import MetricsWriter, Progress
from cmd_jax.training.preemption import Preemption, StopRequested
from cmd_jax.training.resume import check_unchanged
from cmd_jax.training.run import Run, prepare_run
from cmd_jax.training.schedules import steps_per_epoch
from cmd_jax.training.sharding import local_copy


def train(config: ConfigDict, workdir: str) -> None:
    """Trains to the end: restore, then (evaluate, save, next batch, step, log) until done; last, evaluation and report.

    Args:
        config: as given, not resolved.
        workdir: where everything is written; a directory with checkpoints is continued.

    Raises:
        ConfigError: before anything is written; also when the directory's run was started with other values or images, or is in
            use by another process.
        BadImage: too many images to train on or to evaluate on cannot be read.
        CheckpointError: there are checkpoints, and none is whole or they are of another model.
        NonFinite: the loss stopped being finite; the newest checkpoint is good.
        Collapsed: the teacher collapsed, and `train.stop_on_collapse` is set.
        Preempted: SIGTERM or Ctrl-C came, and what was done is saved.
        SaveError: a checkpoint or another file of the run could not be written.
    """
    try:
        with Preemption() as preemption:
            _train(config, workdir, preemption)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SaveError(f"{workdir}: {error.strerror}; {free_space(workdir)}; make room and run again, it continues") from error


def _train(config: ConfigDict, workdir: str, preemption: Preemption) -> None:
    processes.assert_same_on_all_processes(configuration=json.loads(config.to_json()), workdir=workdir)
    run = prepare_run(config_lib.absolute_paths(config), workdir)
    splits, reason = _open_splits(run.config)
    images = identify_splits(run.config, splits, run.source)
    processes.assert_same_on_all_processes(**identity.brief(images))
    processes.check_shared(workdir)
    with hold(workdir) as lock:
        _train_alone(run, splits, reason, images, workdir, preemption, lock)


def _train_alone(
    run: Run,
    splits: Splits,
    reason: NoLabels | None,
    images: dict[str, Split],
    workdir: str,
    preemption: Preemption,
    lock: Lock | None,
) -> None:
    """Trains while no other run writes to the work directory; the first process has its lock."""
    lead, config = processes.is_first(), run.config
    say = functools.partial(print, flush=True) if lead else lambda text: None
    if run.source.note:
        say(f"train: {run.source.note}")
    if reason:
        say(f"evaluation without labels: {reason}")
    elif splits.test.note:
        say(f"test: {splits.test.note}")
    checkpoints = Checkpoints(workdir, config.train.keep_checkpoints, config.train.best_metric)
    # The numbers of the start are there before the first checkpoint.
    if processes.broadcast_from_process_0(bool(checkpoints.steps()) or evaluation_lib.load_metrics(workdir, 0) is not None):
        check_unchanged(config, workdir, images)
    state = checkpoints.resume(run.abstract_state())
    if state is None:
        state = run.first_state()
        compile_fingerprints(state)
    else:
        say(f"continuing {workdir} at step {int(state.step)} of {run.steps}")
    first_step = int(state.step)
    if lead:
        config_lib.save(config, os.path.join(workdir, "config.json"))
        if not first_step or not identity.is_recorded(workdir):
            identity.record(workdir, images)
    writer = MetricsWriter(workdir, first_step) if lead else None
    cache = CanvasCache(run.source, config.data, processes.this_host())
    say(f"cache: {cache.note}")
    ahead = batches(
        cache,
        len(run.source),
        config.train.batch_size,
        config.seed,
        first_step,
        config.data.decode_threads,
        jax.process_index(),
        jax.process_count(),
    )
    stream = Prefetch(ahead, run.place, config.data.prefetch_batches)
    epoch = steps_per_epoch(config, len(run.source))
    save_every = max(1, round(config.train.checkpoint_every_epochs * epoch))
    eval_every = round(config.eval.every_epochs * epoch)
    progress = Progress(first_step, run.steps, config.train.batch_size)
    watch = CollapseWatch(watched_from(config, len(run.source)), config.train.batch_size // config.train.accumulate)
    unread: tuple[int, dict[str, jax.Array]] | None = None
    train_step = run.compile() if first_step < run.steps else None

    def evaluate(step: int) -> None:
        protocols = evaluation_lib.measurable(evaluation_lib.protocols_at(config, step, run.steps), splits)
        if not protocols:
            return
        read_unread()
        with progress.paused():
            measure(step, protocols)

    def measure(step: int, protocols: tuple[str, ...]) -> None:
        if processes.broadcast_from_process_0(evaluation_lib.load_metrics(workdir, step) is None):
            teacher = local_copy(state.teacher, run.shardings)
            evaluation = evaluation_lib.evaluate(config, run.network, teacher, step, splits, preemption.poll, protocols)
            if not lead:
                return
            lock.check()
            before = evaluation_lib.load_metrics(workdir, 0) if step else None
            start = config_lib.start_name(config)
            title = "teacher" if step else f"teacher at the start ({start})"
            progress.say(f"{title}:\n{evaluation_lib.table(evaluation, before, start)}")
            if step == run.steps:
                for path in write_report(evaluation, config, run.network, teacher, splits, workdir):
                    progress.say(f"wrote {path}")
            evaluation_lib.save(evaluation, config, workdir)  # last: the file says that all of it is done
        if lead and step not in writer.evaluated:
            found = evaluation_lib.load_metrics(workdir, step)
            writer.write(step, {f"eval_{name}": value for name, value in found.items()})

    def read_unread() -> bool:
        """Logs the step whose numbers were not read yet when it is time, stops a sick run; returns whether it was good."""
        nonlocal unread
        if unread is None:
            return True
        (step, metrics), unread = unread, None
        bad = bool(metrics["bad_steps_in_row"])  # one number a step; all of them only when they are needed
        due = step % config.train.log_every_steps == 0 or step == run.steps
        values = {name: float(value) for name, value in jax.device_get(metrics).items()} if bad or due else {}
        notes = [read_bad_step(step, values, checkpoints.steps())] if bad else []
        findings = watch.read(step, values) if due else []
        if lead and due:
            lock.check()
            data = {"data_wait_s": stream.waited_s, "bad_images": cache.bad.count}
            writer.write(step, {**values, "images_per_s": progress.images_per_s(), **data})
            progress.show(step, values)
        if findings and config.train.stop_on_collapse:
            raise Collapsed(f"{findings[0]}; checkpoints: {checkpoints.steps() or 'none'}")
        for note in [*notes, *findings]:
            if lead:
                progress.say(f"warning: {note}")
        return not bad

    def save(step: int) -> None:
        # What is saved has passed the checks of its numbers, and a run that goes on from it lacks no line. A step that was left
        # out changed nothing, but it can be the first after numbers that grew too large.
        if step != first_step and step not in checkpoints.steps() and read_unread():
            if lead:
                lock.check()
            with progress.paused():
                checkpoints.save(state, config, processes.broadcast_from_process_0(best_value(step)))

    def best_value(step: int) -> float:
        """NaN where it is not known."""
        if judged:
            return (evaluation_lib.load_metrics(workdir, step) or {}).get(best.removeprefix("eval_"), math.nan)
        return float(metrics[best]) if best else math.nan

    best = config.train.best_metric
    judged = bool(best) and best.startswith("eval_")
    try:
        for step in range(first_step, run.steps):
            preemption.poll()
            checkpoints.check()
            saves = step > first_step and step % save_every == 0
            if step == 0 or (eval_every and step % eval_every == 0) or (saves and judged):
                evaluate(step)
            if saves:
                save(step)
            batch = next(stream)
            with jax.transfer_guard("disallow"):
                state, metrics = train_step(state, batch)
            progress.advance(step + 1)
            # Numbers are fetched one step late, when the device has the next step to work on.
            read_unread()
            unread = (step + 1, metrics)
        read_unread()
        if judged:
            evaluate(run.steps)
        save(run.steps)
        evaluate(run.steps)
    except StopRequested:
        step = int(state.step)
        save(step)
        checkpoints.close()
        raise Preempted(f"stopped as asked at step {step} of {run.steps}; run again with --workdir={workdir}") from None
    finally:
        stream.close()
        progress.close()
        if lock is None or lock.held():  # to close them is to write what is left
            if writer:
                writer.close()
            checkpoints.close()


def _open_splits(config: ConfigDict) -> tuple[Splits, NoLabels | None]:
    splits, reason = open_splits(config)
    if reason and (config.train.best_metric or "").startswith("eval_"):
        raise ConfigError(
            f"train.best_metric is {config.train.best_metric!r}, but {reason}; or set it to feature_std"
        ) from reason
    return splits, reason
