"""Logging of a run: `metrics.jsonl`, TensorBoard events, a progress bar or plain lines."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator

import tqdm
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from cmd_jax import files
from cmd_jax.progress import clock

REWRITE_S = 60  # between two writes of what is collected: TensorBoard's events, and metrics.jsonl in a bucket


class MetricsWriter:
    """Appends numbers of a step to `metrics.jsonl` and to TensorBoard.

    Args:
        workdir: the run's directory.
        first_step: number of steps already done; later lines, left by an interrupted run, are dropped.
        before_write: called before each line.

    Attributes:
        evaluated: steps whose evaluation has its line.
    """

    def __init__(self, workdir: str, first_step: int, before_write: Callable[[], None] = lambda: None):
        self._before_write = before_write
        path = os.path.join(workdir, "metrics.jsonl")
        kept = [line for line in _lines(path) if first_step and json.loads(line)["step"] <= first_step]
        self.evaluated = {json.loads(line)["step"] for line in kept if '"eval_' in line}
        text = "".join(kept)
        files.write(path, text)
        self._file = _BucketFile(path, text) if files.is_remote(path) else open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._board = _Board(os.path.join(workdir, "tb"), first_step + 1 if first_step else 0)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line, `step` first, flushed at once; a number that is not finite is null, which every reader of JSON knows."""
        self._before_write()
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **dict.fromkeys(metrics), **finite}) + "\n")
        self._file.flush()
        if any(name.startswith("eval_") for name in metrics):
            self.evaluated.add(step)
        self._board.write(step, finite)

    def close(self) -> None:
        with contextlib.closing(self._board):
            self._file.close()


def _lines(path: str) -> list[str]:
    """Whole lines of a file; a last line cut off by a kill is left out."""
    lines = files.read(path).splitlines(keepends=True) if files.exists(path) else []
    return [line for line in lines if line.endswith("\n")]


class _Board:
    """TensorBoard's events of a run, on the disk or in the bucket every REWRITE_S seconds and when they are closed.

    `tensorboardX.SummaryWriter` writes in a thread. A full disk ends that thread, and the training then waits for it for ever.

    Args:
        directory: of the events.
        purge_step: TensorBoard hides what an interrupted run wrote of this step and of later ones.
    """

    def __init__(self, directory: str, purge_step: int):
        files.make_directory(directory)
        self._events = EventsWriter(os.path.join(directory, "events"))
        self._add(purge_step, session_log=SessionLog(status=SessionLog.START))
        self._written = time.monotonic()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(step, summary=Summary(value=values))
        if time.monotonic() - self._written >= REWRITE_S:
            self._events.flush()
            self._written = time.monotonic()

    def close(self) -> None:
        self._events.close()

    def _add(self, step: int, **content: Summary | SessionLog) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))


class _BucketFile:
    """A growing text file in a bucket, where nothing can be appended: rewritten every minute and when it is closed.

    Args:
        path: its address.
        text: its content so far.
    """

    def __init__(self, path: str, text: str):
        self._path, self._text = path, text
        self._written = time.monotonic()

    def write(self, line: str) -> None:
        self._text += line

    def flush(self) -> None:
        if time.monotonic() - self._written >= REWRITE_S:
            self.close()

    def close(self) -> None:
        files.write(self._path, self._text)
        self._written = time.monotonic()


class Progress:
    """A bar on a terminal, plain lines elsewhere, with images/s and the remaining time.

    images/s is the pace of the steps alone: neither the first step, which may compile, nor what happens inside `paused` counts.
    The remaining time is that to the last step, at the pace since the first one with its pauses; the evaluation after the last
    step is not in it.

    Args:
        first_step: steps that are done already.
        steps: of the whole run.
        batch_size: images of a step.
        now: a clock, in seconds.
    """

    def __init__(self, first_step: int, steps: int, batch_size: int, now: Callable[[], float] = time.monotonic):
        self._steps, self._batch_size, self._now = steps, batch_size, now
        self._first = self._step = first_step
        self._started: float | None = None
        self._paused_s = 0.0  # since it was started
        self._bar = None
        if sys.stderr.isatty():
            layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
            self._bar = tqdm.tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True, bar_format=layout)

    def advance(self, step: int) -> None:
        """`step` steps are dispatched."""
        if self._started is None:  # the first step compiles: the clock starts behind it
            self._started, self._first = self._now(), step
        self._step = step
        if self._bar:
            self._bar.update(step - self._bar.n)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Work that is no step: an evaluation, a checkpoint. Entered when all steps that were dispatched are done."""
        begun = self._now()
        try:
            yield
        finally:
            if self._started is not None:
                self._paused_s += self._now() - begun

    def images_per_s(self) -> float:
        """Throughput of the steps since the first one."""
        if self._started is None or self._step == self._first:
            return 0.0
        return (self._step - self._first) * self._batch_size / (self._now() - self._started - self._paused_s)

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """Shows a step's numbers."""
        text = (
            f"loss {metrics['loss']:.3f}  entropy {metrics['teacher_entropy']:.2f}  "
            f"feature std {metrics['feature_std']:.2f}  {self.images_per_s():.0f} images/s  ETA {self._eta(step)}"
        )
        if self._bar:
            self._bar.set_postfix_str(text)
        else:
            print(f"step {step}/{self._steps}  {text}", flush=True)

    def _eta(self, step: int) -> str:
        if self._started is None or self._step == self._first:
            return "?"
        return clock((self._steps - step) * (self._now() - self._started) / (self._step - self._first))

    def write_line(self, text: str) -> None:
        """Prints above the bar."""
        tqdm.tqdm.write(text) if self._bar else print(text, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.close()
