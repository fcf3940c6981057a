"""Preemption: a run polls for SIGTERM (of a scheduler) and Ctrl-C between steps and inside evaluations.

A single process has a signal handler of its own. With several, JAX's preemption service receives the SIGTERM of any of them and
picks a moment that all of them reach; a handler registered in Python would silently replace it.
"""

import os
import signal
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequested(BaseException):
    """The run is to stop: raised by `Preemption.poll` and caught by the loop, which saves.

    It is no Exception, so that nothing else catches it.
    """


class Preemption:
    """Receives requests to stop while its `with` block runs."""

    def __init__(self):
        self._requested, self._polls = False, 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Preemption":
        if not jax.distributed.is_initialized():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def poll(self) -> None:
        """Raises if a stop was requested; called by all processes equally often, wherever a run can stop.

        Raises:
            StopRequested: in all processes at the same of their calls.
        """
        self._polls += 1
        if self._requested or (jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(self._polls)):
            raise StopRequested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        for each in SIGNALS:  # the next one ends the process, even inside a compilation
            signal.signal(each, signal.SIG_DFL)
        os.write(2, b"asked to stop: saving after this step; a second signal ends the run at once\n")
