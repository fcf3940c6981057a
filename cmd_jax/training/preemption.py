"""Being asked to stop: SIGTERM of a scheduler, or Ctrl-C. A run looks for it between steps and inside evaluations.

One process has a signal handler of its own. Of several, JAX's preemption service takes the SIGTERM that any of them gets and
picks a moment that all of them reach; a handler registered in Python would silently take its place.
"""

import os
import signal
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequested(BaseException):
    """The run is to stop now: raised where it looks, caught by the loop, which then saves. No error, so none may catch it."""


class Preemption:
    """Looks for the request to stop while its `with` block runs."""

    def __init__(self):
        self._asked, self._polls = False, 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Preemption":
        if not jax.distributed.is_initialized():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def poll(self) -> None:
        """Called by all processes equally often, wherever a run can stop.

        Raises:
            StopRequested: in all processes at the same of their calls.
        """
        self._polls += 1
        if self._asked or (jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(self._polls)):
            raise StopRequested

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        for each in SIGNALS:  # the next one ends the process, even inside a compilation
            signal.signal(each, signal.SIG_DFL)
        os.write(2, b"asked to stop: saving after this step; a second signal ends the run at once\n")
