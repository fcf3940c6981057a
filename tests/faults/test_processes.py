"""Faults 11 and 15: two processes compute what one does, and do not wait for one that is gone."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.faults.runs import last_step
from tests.programs import ROOT
from tests.runs import free_port, lines

EPOCHS = 8
STEPS = 3 * EPOCHS
HEARTBEAT_S = 10


def _two(*command):
    """Flags of two processes that belong together."""
    cluster = ("--distributed", f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2")
    return [(*command, *cluster, f"--heartbeat_s={HEARTBEAT_S}", f"--process_id={index}") for index in range(2)]


def test_two_processes_compute_what_one_does(start, photo_folder, tmp_path, record_property):
    photos = tmp_path / "photos"
    shutil.copytree(photo_folder, photos)
    for name in ("train/b.class/2.png", "test/<script>/3.png"):  # replaced in training, left out of the evaluation
        (photos / name).write_bytes(b"no picture")
    one = start(tmp_path / "one", EPOCHS, photos=photos)
    assert one.end() == 0, one.output()
    two = [start(tmp_path / "two", EPOCHS, *flags, photos=photos) for flags in _two()]
    assert [run.end() for run in two] == [0, 0], "\n".join(run.output() for run in two)
    ours, theirs = ([line for line in lines(tmp_path / name) if "loss" in line] for name in ("two", "one"))
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    relative = abs(ours[0]["loss"] / theirs[0]["loss"] - 1)
    record_property("two processes", f"first loss differs by {relative:.1e} of it")
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-6)
    assert ours[-1]["loss"] == pytest.approx(theirs[-1]["loss"], rel=1e-4)

    # the eval binary on two processes: numbers as one process measures them, written once
    path = tmp_path / "two" / "eval" / str(STEPS) / "metrics.json"
    trained = json.loads(path.read_text())
    assert trained["images_left_out"] == {"train": 1, "test": 1}
    path.unlink()
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "cmd_jax.eval", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for flags in _two(f"--workdir={tmp_path / 'two'}")
    ]
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert json.loads(path.read_text()) == trained
    assert "Retrieval Rank-1" in outputs[0][0]
    assert "Rank-1" not in outputs[1][0]


WAITER = """
import sys, time
from cmd_jax.training import processes

processes.start(sys.argv[1], 2, int(sys.argv[2]), heartbeat_s=2)
time.sleep(0 if int(sys.argv[2]) else 7)
processes.wait_for_all()
"""


def test_slow_report_outlasts_the_heartbeat():
    address = f"127.0.0.1:{free_port()}"
    processes = [subprocess.Popen([sys.executable, "-c", WAITER, address, str(index)], cwd=ROOT) for index in range(2)]
    assert [process.wait() for process in processes] == [0, 0]


def test_processes_end_when_one_is_killed(start, tmp_path):
    workdir = tmp_path / "run"
    runs = [start(workdir, EPOCHS, *flags) for flags in _two()]
    assert runs[0].wait_for(lambda: last_step(workdir) > 2), runs[0].output()
    runs[1].kill()
    assert runs[0].end() not in (0, 64, 65, 70), runs[0].output()  # a launcher starts both again
