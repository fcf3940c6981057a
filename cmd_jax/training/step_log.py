"""Logs the metrics of steps, warns of non-finite steps and collapse, and stops the run where it must."""

from collections.abc import Callable

import jax

from cmd_jax.errors import Collapsed
from cmd_jax.training.health import CollapseWatch, read_bad_step, watched_from
from cmd_jax.training.metrics import MetricsWriter, Progress
from cmd_jax.training.processes import is_first
from cmd_jax.training.run import Run


class StepLog:
    """Logs and checks the metrics of steps, each one step late, when the device has the next step to work on.

    Args:
        run: whose steps are logged.
        writer: None in all processes but the first.
        progress: of the run.
        counters: numbers of the input pipeline that stand in every logged line.
        saved_steps: steps of the checkpoints on disk, for messages.
    """

    def __init__(
        self,
        run: Run,
        writer: MetricsWriter | None,
        progress: Progress,
        counters: Callable[[], dict[str, float]],
        saved_steps: Callable[[], list[int]],
    ):
        self._steps, self._options, batch_size = run.steps, run.config.train, run.config.train.batch_size
        self._watch = CollapseWatch(watched_from(run.config, len(run.source)), batch_size // self._options.accumulate)
        self._writer, self._progress, self._counters, self._saved_steps = writer, progress, counters, saved_steps
        self._pending: tuple[int, dict[str, jax.Array]] | None = None

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that was dispatched, and reads those of the step before.

        Raises:
            NonFinite: too many steps in a row were not finite.
            Collapsed: the teacher collapsed, and `train.stop_on_collapse` is set.
        """
        self._progress.advance(step)
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> bool:
        """Reads the metrics that were not read yet; False if their step was left out because it was not finite."""
        if self._pending is None:
            return True
        (step, metrics), self._pending = self._pending, None
        is_bad = bool(metrics["bad_steps_in_row"])  # one number a step; all of them only when they are needed
        is_logged = step % self._options.log_every_steps == 0 or step == self._steps
        values = {name: float(value) for name, value in jax.device_get(metrics).items()} if is_bad or is_logged else {}
        warnings = [read_bad_step(step, values, self._saved_steps())] if is_bad else []
        findings = self._watch.read(step, values) if is_logged else []
        if self._writer and is_logged:
            self._writer.write(step, {**values, "images_per_s": self._progress.images_per_s(), **self._counters()})
            self._progress.show(step, values)
        if findings and self._options.stop_on_collapse:
            raise Collapsed(f"{findings[0]}; checkpoints: {self._saved_steps() or 'none'}")
        for warning in [*warnings, *findings] if is_first() else []:
            self._progress.write_line(f"warning: {warning}")
        return not is_bad
