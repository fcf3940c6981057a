"""Trains a configuration to its end in a work directory; called again, it goes on from the newest checkpoint."""

import functools
import json
import os
from collections.abc import Callable

import jax

from cmd_jax import config as config_lib
from cmd_jax import files
from cmd_jax.config import ConfigDict
from cmd_jax.data.loader import CanvasCache, Prefetch, batches
from cmd_jax.evaluation import evaluate as evaluation_lib
from cmd_jax.report.pictures import write_pictures
from cmd_jax.training import processes
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.health import Collapsed, CollapseWatch, read_bad_step, watched_from
from cmd_jax.training.metrics import MetricsWriter, Progress
from cmd_jax.training.resume import check_unchanged
from cmd_jax.training.run import prepare_run
from cmd_jax.training.schedules import steps_per_epoch
from cmd_jax.training.sharding import local_copy


def train(config: ConfigDict, workdir: str) -> None:
    """Trains to the end: restore, then (evaluate, save, next batch, step, log) until done; last, evaluation and pictures.

    Args:
        config: as given, not resolved.
        workdir: where everything is written; a directory with checkpoints is continued.

    Raises:
        ConfigError: before anything is written; also when the directory's run was started with other values.
        BadImage: too many training images, or one to evaluate on, cannot be read.
        NonFinite: the loss stopped being finite; the newest checkpoint is good.
        Collapsed: the teacher collapsed, and `train.stop_on_collapse` is set.
    """
    lead = processes.is_first()
    say = functools.partial(print, flush=True) if lead else lambda text: None
    processes.agree(configuration=json.loads(config.to_json()), workdir=workdir)
    run = prepare_run(config)
    config = run.config
    processes.agree(**{"training images": [len(run.source), run.source.class_names]})
    processes.check_shared(workdir)
    files.make_directory(workdir)
    checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
    if checkpoints.steps():
        check_unchanged(config, workdir)
        state = checkpoints.restore_state(run.abstract_state())
        say(f"continuing {workdir} at step {int(state.step)} of {run.steps}")
    else:
        state = run.first_state()
    first_step = int(state.step)
    if lead:
        config_lib.save(config, os.path.join(workdir, "config.json"))
    writer = MetricsWriter(workdir, first_step) if lead else None
    labelled = _labelled_splits(config, say)
    cache = CanvasCache(run.source, config.data)
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
    train_step = run.compile()

    def evaluate(step: int) -> None:
        if labelled and processes.of_first(evaluation_lib.load_metrics(workdir, step) is None):
            teacher = local_copy(state.teacher, run.shardings)
            evaluation = evaluation_lib.evaluate(config, run.network, teacher, step, labelled)
            if not lead:
                return
            evaluation_lib.save(evaluation, config, workdir)
            writer.write(step, {f"eval_{name}": value for name, value in evaluation.metrics().items()})
            before = evaluation_lib.load_metrics(workdir, 0) if step else None
            progress.say(f"{'untrained ' if not step else ''}teacher:\n{evaluation_lib.table(evaluation, before)}")
            if step == run.steps:
                for path in write_pictures(evaluation, config, labelled, workdir):
                    progress.say(f"wrote {path}")

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
            data = {"data_wait_s": stream.waited_s, "bad_images": cache.bad.count}
            writer.write(step, {**values, "images_per_s": progress.images_per_s(), **data})
            progress.show(step, values)
        if findings and config.train.stop_on_collapse:
            raise Collapsed(f"{findings[0]}; checkpoints: {checkpoints.steps() or 'none'}")
        for note in [*notes, *findings]:
            if lead:
                progress.say(f"warning: {note}")
        return not bad

    try:
        for step in range(first_step, run.steps):
            if step == 0 or (eval_every and step % eval_every == 0):
                evaluate(step)
            # A step that was left out changed nothing, but it can be the first after numbers that grew too large.
            if step > first_step and step % save_every == 0 and read_unread():
                checkpoints.save(state, config)
            batch = next(stream)
            with jax.transfer_guard("disallow"):
                state, metrics = train_step(state, batch)
            progress.advance(step + 1)
            # Numbers are fetched one step late, when the device has the next step to work on.
            read_unread()
            unread = (step + 1, metrics)
        read_unread()
        if run.steps not in checkpoints.steps():
            checkpoints.save(state, config)
        evaluate(run.steps)
    finally:
        stream.close()
        progress.close()
        if writer:
            writer.close()
        checkpoints.close()


def _labelled_splits(config: ConfigDict, say: Callable[[str], None]) -> evaluation_lib.LabelledSplits | None:
    try:
        return evaluation_lib.open_labelled_splits(config)
    except evaluation_lib.NoLabels as reason:
        say(f"training without evaluation: {reason}")
        return None
