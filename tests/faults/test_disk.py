"""Fault 7: a disk that is full when a checkpoint is written."""

import ctypes
import os
import re
import signal

import numpy as np
import pytest

from tests.faults.runs import final_state, last_step

EPOCHS = 8
LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    if LIBC.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, b"size=24m"):
        pytest.skip(f"a file system cannot be mounted here: {os.strerror(ctypes.get_errno())}; test_checkpoint.py limits files")
    yield path
    LIBC.umount2(os.fsencode(path), 2)  # MNT_DETACH


def test_full_disk_leaves_the_last_step_intact(small_disk, start, tmp_path):
    workdir = small_disk / "run"
    other = start(tmp_path / "other", EPOCHS)
    assert other.end() == 0, other.output()
    run = start(workdir, EPOCHS)
    assert run.wait_for(lambda: last_step(workdir) > 3), run.output()
    run.send(signal.SIGTERM)
    assert run.end() == 75, run.output()
    saved = final_state(workdir)
    size = sum(path.stat().st_size for path in (workdir / "checkpoints" / str(saved[0])).rglob("*") if path.is_file())
    statistics = os.statvfs(small_disk)
    ballast = small_disk / "ballast"
    ballast.write_bytes(np.random.default_rng(0).bytes(statistics.f_bavail * statistics.f_frsize - size // 2))
    run = start(workdir, EPOCHS)  # goes on, and its next step does not fit
    assert run.end() == 65, run.output()
    (error,) = [line for line in run.output().splitlines() if line.startswith("error: ")]
    assert re.search(rf"{workdir}.* MiB are free there", error), error
    assert final_state(workdir) == saved
    ballast.unlink()
    run = start(workdir, EPOCHS)
    assert run.end() == 0, run.output()
    assert final_state(workdir) == final_state(tmp_path / "other")
