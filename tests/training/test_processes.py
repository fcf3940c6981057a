"""Several processes: what they must agree on, through the train binary itself (tests/faults has whole runs)."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from cmd_jax.training import processes
from cmd_jax.training.sharding import all_hardware
from tests.runs import free_port

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("different", "message"),
    [
        (["--config.train.batch_size=1{process}", "--workdir={tmp}"], "configuration of process 1 differ"),
        (["--workdir={tmp}/{process}"], "workdir of process 1 differ"),
        (
            ["--config.train.batch_size=8", "--workdir=run"],
            "--workdir=run of process 1 is not the directory that process 0 writes",
        ),
    ],
    ids=["configuration", "workdir", "not shared"],
)
def test_differing_processes_all_stop(programs, photo_folder, tmp_path, different, message):
    port, running = free_port(), []
    for process in range(2):
        given = ["--distributed", f"--config={ROOT}/configs/folder.py:small", f"--config.data.folder={photo_folder}"]
        given += [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2", f"--process_id={process}"]
        given += [option.format(process=process, tmp=tmp_path) for option in different]
        cwd = tmp_path / str(process)  # a relative path then means two directories, as on hosts that share none
        cwd.mkdir()
        running.append(programs.start("cmd_jax.main", *given, cwd=cwd, stdout=cwd / "out", stderr=cwd / "err"))
    for process, program in enumerate(running):
        code, err = program.wait(), (tmp_path / str(process) / "err").read_text()
        assert code == 64, err
        assert message in err.splitlines()[-1]
    assert not list(tmp_path.rglob("checkpoints"))


class _Device:
    platform = "gpu"

    def __init__(self, gib):
        self._gib = gib

    def memory_stats(self):
        return {"bytes_limit": self._gib << 30} if self._gib else None


def test_smallest_device_memory_counts(monkeypatch):
    assert all_hardware().memory_bytes is None  # a CPU's
    monkeypatch.setattr(jax, "local_devices", lambda: [_Device(80), _Device(40)])
    assert all_hardware().memory_bytes == 40 << 30
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: np.stack([own, np.int32(24 << 10)]))
    assert all_hardware().memory_bytes == 24 << 30


def test_incomplete_cluster_flags_name_the_remedy(programs, tmp_path):
    for options, message in (
        (["--distributed"], "--distributed: "),
        (["--distributed", "--process_id=0"], "belong together; pass all three, or none on Cloud TPU and SLURM"),
        (["--num_processes=2"], "need --distributed; add it"),
    ):
        done = programs.run("cmd_jax.main", "--config=configs/demo.py", f"--workdir={tmp_path}", *options)
        assert done.returncode == 64, done.stderr
        assert message in done.stderr.strip().splitlines()[-1]


class _Here(threading.local):
    """Of a thread that stands for a process: its index and its directory of files in memory."""

    index, shared = 0, ""

    def __fspath__(self):
        return self.shared


def test_processes_find_their_shared_memory(tmp_path, monkeypatch):
    # Two containers on machine a, one of two processes and one of one; b has one process and no such directory.
    directories, machines = ["a1", "a2", "a1", "no"], ["a", "a", "a", "b"]
    for name in ("a1", "a2"):
        (tmp_path / name).mkdir()
    here, barrier, rows = _Here(), threading.Barrier(4), [None] * 4

    def gather(value):
        rows[here.index] = value
        barrier.wait(30)
        everyone = np.stack(rows)
        barrier.wait(30)
        return everyone

    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: here.index)
    monkeypatch.setattr(processes, "SHARED_MEMORY", here)
    monkeypatch.setattr(processes, "_machine", lambda: machines[here.index])
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
    monkeypatch.setattr(processes.multihost_utils, "broadcast_one_to_all", lambda value: gather(value)[0])
    monkeypatch.setattr(processes, "wait_for_all", lambda: barrier.wait(30))

    def process(index):
        here.index, here.shared = index, str(tmp_path / directories[index])
        host = processes.this_host()
        return host, host.least(5.0 - index)

    with ThreadPoolExecutor(4) as pool:
        hosts, least = zip(*pool.map(process, range(4)), strict=True)
    assert [host.rank for host in hosts] == [0, 0, 1, 0]
    assert [host.groups for host in hosts] == [2, 2, 2, 1]
    assert all(host.shares for host in hosts)
    assert len({host.token for host in hosts}) == 1
    assert least == (2.0,) * 4
    assert not list(tmp_path.rglob("cmd_jax*"))
