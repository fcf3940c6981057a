"""Runs without evaluation, and what a run has left in its work directory."""

import json
import socket
from pathlib import Path

import jax
import numpy as np

from cmd_jax.train_and_evaluate import prepare
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.train import train as loop

TIMES = ("images_per_s", "data_wait_s")


def train(config, workdir, poll=lambda: None, evaluate=lambda *_: {}):
    """Trains in this process; nothing is evaluated unless by `evaluate`."""
    loop(prepare(config), str(workdir), {}, evaluate, poll)


def lines(workdir, times=True):
    """Whole lines of metrics.jsonl; without the values that are times if they are to be compared."""
    path = Path(workdir) / "metrics.jsonl"
    found = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in found if line.endswith("\n")]
    return found if times else [{key: line[key] for key in line if key not in TIMES} for line in found]


def steps(workdir):
    """Steps of the checkpoints."""
    checkpoints = Checkpoints(str(workdir), read_only=True)
    found = checkpoints.steps()
    checkpoints.close()
    return found


def state(workdir, config, step=None):
    """The newest state, or that of a step, in the host's memory."""
    checkpoints = Checkpoints(str(workdir), read_only=True)
    found = checkpoints.restore_state(prepare(config).abstract_state(), step)
    checkpoints.close()
    return jax.device_get(found)


def free_port():
    """Of a coordinator on this machine."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def assert_same(a, b):
    """Two trees have the same bits."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
