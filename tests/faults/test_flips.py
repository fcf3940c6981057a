"""Fault 4: whatever single bit of the newest step is changed, the arrays are right or the step is passed over."""

import gc
import random
import shutil

import jax
import numpy as np

from cmd_jax.train_and_evaluate import prepare
from cmd_jax.training.checkpoint import Checkpoints

FLIPS = 120


def _resume(workdir, abstract):
    checkpoints = Checkpoints(str(workdir))
    state = checkpoints.resume(abstract)
    checkpoints.close()
    return state


def test_no_flipped_bit_goes_unnoticed(finished, tmp_path, record_property):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    abstract = prepare(finished[1]).abstract_state()
    reader = Checkpoints(str(workdir), read_only=True)
    good = {step: jax.tree.leaves(jax.device_get(reader.restore_state(abstract, step))) for step in reader.steps()}
    older, newest = sorted(good)
    directory = workdir / "checkpoints" / str(newest)
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)
    sizes = [path.stat().st_size for path in files]
    rng, noticed = random.Random(1), 0
    for number in range(FLIPS):
        # every other one anywhere in the bytes, which are nearly all values; the others in any of the files
        path = rng.choices(files, sizes)[0] if number % 2 else files[number // 2 % len(files)]
        data = path.read_bytes()
        bit = rng.randrange(8 * len(data))
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        state = _resume(workdir, abstract)
        step = int(state.step)
        where = f"bit {bit} of {path.relative_to(directory)}"
        assert step in good, where
        for a, b in zip(good[step], jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=where)
        aside = list(directory.parent.glob(f"{newest}.damaged-*"))
        assert len(aside) == (step == older), where
        if aside:
            noticed += 1
            aside[0].rename(directory)
        path.write_bytes(data)
    for _ in range(5):  # reads that were given up are noticed here, where they are expected
        gc.collect()
    assert noticed > FLIPS / 4
    counts = f"{FLIPS} over {len(files)} files: {noticed} noticed, {FLIPS - noticed} without effect, 0 silent"
    record_property("flips", counts)


def test_only_damaged_steps_end_with_65(finished, start, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    for path in (workdir / "checkpoints").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(bytes(len(path.read_bytes())))
    for _ in range(2):
        run = start(workdir, 2, "--config.eval.every_epochs=0.0")
        assert run.end() == 65, run.output()
        assert "refusing to start from scratch" in run.output()
