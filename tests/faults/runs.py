"""True runs of the train binary that a test interrupts, and what is compared of them afterwards."""

import hashlib
import signal
import time
from pathlib import Path

import jax
import numpy as np

from cmd_jax import config as config_lib
from tests import runs

SAVE_EVERY, EVALUATE_EVERY = 3, 6
PATIENCE_S = 300  # for a moment that must come


class TrainRun:
    """A process of `cmd_jax.main` in a work directory; its output lies in a directory of its own."""

    def __init__(self, programs, workdir, photos, logs, epochs, *flags):
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        given = [f"--workdir={workdir}", f"--config.data.folder={photos}", f"--config.train.epochs={epochs}", *flags]
        self._log = Path(logs) / f"{workdir.name}-{time.monotonic_ns()}.log"
        self._process = programs.start(
            "cmd_jax.main", "--config=tests/faults/config.py", *given, stdout=self._log, stderr=self._log
        )

    def wait_for(self, condition, every_s=0.05):
        """Whether a moment came before the process ended. To look more often for a short one costs the run a core's time."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if self._process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.output()
            time.sleep(every_s)
        return True

    def send(self, number):
        self._process.send_signal(number)

    def kill(self):
        self.send(signal.SIGKILL)
        return self.end()

    def end(self):
        """The exit code."""
        return self._process.wait(PATIENCE_S)

    def output(self):
        return self._log.read_text()


def last_step(workdir):
    return max((line["step"] for line in runs.lines(workdir) if "loss" in line), default=0)


def is_saving(workdir):
    """Whether a step is begun and not committed."""
    directory = Path(workdir) / "checkpoints"
    found = [path for path in directory.iterdir() if path.name.split(".")[0].isdigit()] if directory.exists() else []
    return any(path.exists() and not (path / "commit_success.txt").exists() for path in found)


def is_evaluating(workdir):
    """Whether the last step is one that is evaluated, and its evaluation is not written yet."""
    step = last_step(workdir)
    return step > 0 and step % EVALUATE_EVERY == 0 and not (Path(workdir) / "eval" / str(step) / "metrics.json").exists()


def final_state(workdir):
    """(step, sha256 over all arrays) of the newest checkpoint."""
    state = runs.state(workdir, config_lib.load(str(Path(workdir) / "config.json")))
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return int(state.step), digest.hexdigest()


def assert_same_results(workdir, reference, steps):
    """State, metrics.jsonl and evaluations of a run equal those of another; no step is lost or there twice."""
    assert final_state(workdir) == final_state(reference)
    assert final_state(workdir)[0] == steps
    ours = runs.lines(workdir, times=False)
    assert ours == runs.lines(reference, times=False)
    assert [line["step"] for line in ours if "loss" in line] == list(range(1, steps + 1))
    evaluated = list(range(0, steps + 1, EVALUATE_EVERY))
    assert [line["step"] for line in ours if "eval_rank1" in line] == evaluated
    for step in evaluated:
        name = Path("eval") / str(step) / "metrics.json"
        assert (Path(workdir) / name).read_bytes() == (Path(reference) / name).read_bytes()
