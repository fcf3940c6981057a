"""One trainer a work directory: who gets the lock, who is refused, and who notices that it lost it. The clock is a fake."""

import json
import os
import subprocess
import sys

import pytest

from cmd_jax import files
from cmd_jax.errors import InUse
from cmd_jax.training import lock as lock_lib
from cmd_jax.training.lock import BEAT_S, LEASE_S, Lock, hold
from tests.buckets import bucket


@pytest.fixture(params=["disk", "bucket"])
def workdir(request, tmp_path):
    if request.param == "disk":
        yield str(tmp_path)
    else:
        with bucket() as address:
            yield f"{address}/run"


class Clock:
    """Sleeping takes no time, and lets other processes do something."""

    def __init__(self, monkeypatch):
        self.now, self.then = 0.0, lambda: None
        monkeypatch.setattr(lock_lib, "_now", lambda: self.now)
        monkeypatch.setattr(lock_lib.time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.now += seconds
        self.then()


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def _other(workdir, beats=0, **changed):
    """Writes the lock of a process on another machine."""
    holder = {
        "host": "node7",
        "pid": 42,
        "since": "2026-01-02 03:04:05 +0000",
        "machine": "other",
        "started": "1",
        "token": "t",
    }
    files.write(f"{workdir}/lock.json", json.dumps({**holder, **changed, "beats": beats}))


def _holder(workdir):
    return json.loads(files.read(f"{workdir}/lock.json"))


def test_second_trainer_is_told_the_holder(workdir, clock):
    with hold(workdir):
        found = _holder(workdir)
        assert found["pid"] == os.getpid()
        message = rf"is in use: process {os.getpid()} on {found['host']} since \d{{4}}-.* trains there"
        with pytest.raises(InUse, match=message), hold(workdir):
            pass
        assert clock.now == 0.0  # the kernel knows
    assert not files.exists(f"{workdir}/lock.json")
    with pytest.raises(ZeroDivisionError), hold(workdir):
        _ = 1 / 0
    assert not files.exists(f"{workdir}/lock.json")


def test_killed_holder_is_replaced_at_once(workdir, clock):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    of_child = {"machine": lock_lib._machine(), "pid": child.pid, "started": lock_lib._started(child.pid)}
    _other(workdir, **of_child)
    with pytest.raises(InUse, match=f"process {child.pid}"), hold(workdir):
        pass
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie
    with hold(workdir):
        assert _holder(workdir)["pid"] == os.getpid()
    child.communicate()
    # Its process id may be another process's by now.
    for pid in (child.pid, os.getpid()):
        _other(workdir, **{**of_child, "pid": pid})
        with hold(workdir):
            assert _holder(workdir)["token"] != "t"
    assert clock.now < 1


@pytest.mark.parametrize("content", [None, "", "[1]", "{"], ids=["of a machine that died", "empty", "a list", "cut off"])
def test_expired_lock_is_taken_over(workdir, clock, capsys, content):
    _other(workdir)
    if content is not None:
        files.write(f"{workdir}/lock.json", content)
    with hold(workdir):
        assert LEASE_S <= clock.now <= LEASE_S + 2 * BEAT_S
        assert _holder(workdir)["pid"] == os.getpid()
    who = "an unknown process" if content is not None else "process 42 on node7 since 2026-01-02 03:04:05 +0000"
    assert f"is locked by {who}; watching for 60 s" in capsys.readouterr().out


def test_living_holder_elsewhere_keeps_its_lock(workdir, clock):
    _other(workdir)
    clock.then = lambda: _other(workdir, int(clock.now / BEAT_S))
    with pytest.raises(InUse, match="is in use: process 42 on node7 since 2026-01-02 03:04:05"), hold(workdir):
        pass
    assert _holder(workdir)["host"] == "node7"


def test_holder_that_ends_or_dies_makes_room(workdir, clock):
    _other(workdir)
    clock.then = lambda: files.remove(f"{workdir}/lock.json") if clock.now == 3 * BEAT_S else None
    with hold(workdir):
        assert clock.now == 3 * BEAT_S
    _other(workdir)
    start = clock.now
    clock.then = lambda: _other(workdir, 1) if clock.now == start + 4 * BEAT_S else None
    with hold(workdir):
        assert clock.now >= start + 4 * BEAT_S + LEASE_S


def test_last_writer_wins_a_takeover(workdir, clock):
    _other(workdir)
    clock.then = lambda: _other(workdir, host="node8", token="u") if clock.now > LEASE_S + BEAT_S / 2 else None
    with pytest.raises(InUse, match=r"process 42 on node8 since .* has just taken it over"), hold(workdir):
        pass


def test_holder_notices_a_takeover(workdir, clock):
    lock = Lock(workdir)
    assert lock.acquire()
    lock.check()
    before = files.read(f"{workdir}/lock.json")
    clock.now += LEASE_S + 1  # the thread did not run: the process was suspended
    lock.check()
    assert files.read(f"{workdir}/lock.json") != before
    files.remove(f"{workdir}/lock.json")
    clock.now += LEASE_S + 1
    lock.check()  # nobody else has it
    _other(workdir)
    lock.check()  # not asked at every write
    clock.now += LEASE_S + 1
    with pytest.raises(InUse, match=r"taken over by process 42 on node7 .* stops and writes nothing more"):
        lock.check()
    lock.release()
    assert _holder(workdir)["host"] == "node7"


def test_thread_keeps_the_lock_fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_lib, "BEAT_S", 0.001)
    lock = Lock(str(tmp_path))
    assert lock.acquire()
    while _holder(tmp_path)["beats"] < 2:
        pass
    _other(tmp_path)
    lock._thread.join()
    assert not lock.held()
    with pytest.raises(InUse):
        lock.check()
    lock.release()
