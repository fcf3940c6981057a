"""The training loop: restore, then (evaluate, save, next batch, step, log) until done."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import jax
import numpy as np

from cmd_jax import config as config_lib
from cmd_jax import files
from cmd_jax.config import BEST_METRICS
from cmd_jax.data import identity
from cmd_jax.data.cache import CanvasCache
from cmd_jax.data.identity import Split
from cmd_jax.data.loader import Prefetch, batches
from cmd_jax.errors import Preempted, SaveError
from cmd_jax.models.build import Params
from cmd_jax.training import processes
from cmd_jax.training.checkpoint import Checkpoints, compile_fingerprints, free_space
from cmd_jax.training.lock import hold
from cmd_jax.training.metrics import MetricsWriter, Progress
from cmd_jax.training.preemption import StopRequested
from cmd_jax.training.resume import check_unchanged
from cmd_jax.training.run import Run, with_weights
from cmd_jax.training.schedules import steps_per_epoch
from cmd_jax.training.state import TrainState
from cmd_jax.training.step_log import StepLog


class Evaluate(Protocol):
    """Measures the teacher of a step and writes what it found to the work directory; called in all processes at once."""

    def __call__(
        self,
        step: int,
        teacher: Params,
        poll: Callable[[], None],
        before_write: Callable[[], None],
        write_line: Callable[[str], None],
        final: bool,
    ) -> Mapping[str, float]:
        """
        Args:
            step: number of steps done.
            teacher: parameters as they lie on the mesh of the run.
            poll: called by all processes equally often; it raises where the run is to stop.
            before_write: called before anything is written to the work directory.
            write_line: prints beside the progress bar.
            final: whether the step is the result of the run, of which everything is measured.

        Returns:
            Name -> number, for the log; of an evaluation that is on disk already, what lies there. Empty in a step that is not
            evaluated.
        """


def train(
    run: Run,
    workdir: str,
    images: dict[str, Split],
    evaluate: Evaluate,
    poll: Callable[[], None] = lambda: None,
    initial_weights: Callable[[], Mapping[str, np.ndarray]] = dict,
) -> None:
    """Trains to the end: restore, then (evaluate, save, next batch, step, log) until done; last, an evaluation.

    Args:
        run: of `prepare_run`.
        workdir: where everything is written; a directory with checkpoints is continued.
        images: the splits that the run reads, by their keys in `identity.SPLITS`.
        evaluate: called at the start, every `eval.every_epochs`, and at the end for the result; also before saving if the best
            step is chosen by an evaluation, where the start is saved and a candidate too.
        poll: called between steps and inside evaluations, by all processes equally often; raises StopRequested.
        initial_weights: name -> array, in place of a new run's random parameters.

    Raises:
        ConfigError: the directory's run was started with other values or images, or is in use by another process.
        BadImage: too many images to train on or to evaluate on cannot be read.
        CheckpointError: there are checkpoints, and none is whole or they are of another model.
        NonFinite: the loss stopped being finite; the newest checkpoint is good.
        Collapsed: the teacher collapsed, and `train.stop_on_collapse` is set.
        Preempted: the run was asked to stop, and what was done is saved.
        SaveError: a checkpoint or another file of the run could not be written.
    """
    processes.assert_same_on_all_processes(**identity.brief(images))
    processes.check_shared(workdir)
    config, is_first = run.config, processes.is_first()
    epoch = steps_per_epoch(config, len(run.source))
    save_every = max(1, round(config.train.checkpoint_every_epochs * epoch))
    eval_every = round(config.eval.every_epochs * epoch)
    best_metric = config.train.best_metric or ""
    best_is_evaluated = bool(best_metric and BEST_METRICS[best_metric].protocol)

    with _full_disk_ends_run(workdir), hold(workdir) as lock:
        before_write = lock.check if lock else lambda: None
        checkpoints = Checkpoints(workdir, config.train.keep_checkpoints, config.train.best_metric)
        state = _restore_or_init(run, workdir, images, checkpoints, initial_weights)
        first_step = int(state.step)
        if is_first:
            config_lib.save(config, os.path.join(workdir, "config.json"))
            if not first_step or not identity.is_recorded(workdir):
                identity.record(workdir, images)
        cache = CanvasCache(run.source, config.data, processes.this_host())
        processes.print_once(f"cache: {cache.note}")
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
        progress = Progress(first_step, run.steps, config.train.batch_size)
        writer = MetricsWriter(workdir, first_step, before_write) if is_first else None
        counters = lambda: {"data_wait_s": stream.waited_s, "bad_images": cache.bad.count}
        log = StepLog(run, writer, progress, counters, checkpoints.steps)
        train_step = run.compile() if first_step < run.steps else None
        metrics: Mapping[str, float | jax.Array] = {}

        def measure(step: int, teacher: Params, final: bool = False) -> Mapping[str, float]:
            log.flush()  # the lines of the steps before stand first
            with progress.paused():
                values = evaluate(step, teacher, poll, before_write, progress.write_line, final)
            values = {f"eval_{name}": value for name, value in values.items()}
            if writer and values and step not in writer.evaluated:
                writer.write(step, values)
            return values

        def save(step: int, state: TrainState, metrics: Mapping[str, float | jax.Array]) -> None:
            # A state is saved when its metrics are logged and finite: so a resumed run lacks no line, and starts before the
            # numbers grew too large.
            if step not in checkpoints.steps() and log.flush():
                before_write()
                with progress.paused():
                    best = float(metrics.get(best_metric, np.nan))
                    checkpoints.save(state, config, processes.broadcast_from_process_0(best))

        try:
            for step in range(first_step, run.steps):
                poll()
                checkpoints.check()
                is_saved = step > first_step and step % save_every == 0
                if step == 0 or (eval_every and step % eval_every == 0) or (is_saved and best_is_evaluated):
                    metrics = {**metrics, **measure(step, state.teacher)}
                if is_saved or (step == 0 and best_is_evaluated):
                    save(step, state, metrics)
                batch = next(stream)
                with jax.transfer_guard("disallow"):
                    state, metrics = train_step(state, batch)
                log.add(step + 1, metrics)
            log.flush()
            if best_is_evaluated:
                metrics = {**metrics, **measure(run.steps, state.teacher)}
            save(run.steps, state, metrics)
            result, teacher = checkpoints.result_step(), state.teacher
            if result != run.steps:
                teacher = checkpoints.restore_teacher(run.abstract_state().teacher, result)[1]
            measure(result, teacher, final=True)
            processes.wait_for_all()
        except StopRequested:
            step = int(state.step)
            if step > first_step:
                save(step, state, metrics)
            checkpoints.close()
            raise Preempted(f"stopped as asked at step {step} of {run.steps}; run again with --workdir={workdir}") from None
        finally:
            with contextlib.ExitStack() as last:  # all are closed, in the reverse order, also where one of them fails
                if lock is None or lock.held():  # closing them writes what is left
                    last.callback(checkpoints.close)
                    if writer:
                        last.callback(writer.close)
                last.callback(progress.close)
                last.callback(stream.close)


def _restore_or_init(
    run: Run,
    workdir: str,
    images: dict[str, Split],
    checkpoints: Checkpoints,
    initial_weights: Callable[[], Mapping[str, np.ndarray]],
) -> TrainState:
    """The newest state of a run that has begun, if it is still the same run; else the first state."""
    # The numbers of the start are there before the first checkpoint.
    has_begun = bool(checkpoints.steps()) or files.exists(os.path.join(workdir, "eval", "0", "metrics.json"))
    if processes.broadcast_from_process_0(has_begun):
        check_unchanged(run.config, workdir, images)
    state = checkpoints.resume(run.abstract_state())
    if state is not None:
        processes.print_once(f"continuing {workdir} at step {int(state.step)} of {run.steps}")
        return state
    state = with_weights(run.first_state(), initial_weights())
    compile_fingerprints(state)
    return state


@contextlib.contextmanager
def _full_disk_ends_run(workdir: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SaveError(f"{workdir}: {error.strerror}; {free_space(workdir)}; make room and run again, it continues") from error
