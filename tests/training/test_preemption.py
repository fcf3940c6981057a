"""Signals that ask a run to stop."""

import os
import signal

import pytest

from cmd_jax.training.preemption import Preemption, StopRequested


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_has_its_default_effect(number):
    before = signal.getsignal(number)
    with Preemption() as preemption:
        preemption.poll()
        os.kill(os.getpid(), number)
        with pytest.raises(StopRequested):
            preemption.poll()
        assert signal.getsignal(number) == signal.SIG_DFL
    assert signal.getsignal(number) is before
