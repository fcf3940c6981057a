"""A lock file, `lock.json`, that lets one process at a time train in a work directory.

The file is created exclusively, which a local disk, NFS and a bucket all guarantee, and its holder rewrites it every BEAT_S
seconds. A lock whose holder ran on this machine and is gone is taken over at once. That of another machine is watched, and
taken over once it has not changed for LEASE_S seconds; clocks of different machines are not compared.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from cmd_jax import files
from cmd_jax.errors import ConfigError, InUse
from cmd_jax.training import processes

NAME = "lock.json"
BEAT_S = 10.0
LEASE_S = 60.0
WAITING, HELD, REFUSED = 0.0, 1.0, 2.0
SETTLE_S = 0.3  # in which two processes that take over the same lock of a dead process have both written


class Lock:
    """The lock of a work directory; `hold` acquires and releases it."""

    def __init__(self, workdir: str):
        self._path, self._workdir = os.path.join(workdir, NAME), workdir
        self._me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "machine": _machine(),
            "started": _started(os.getpid()),
            "token": secrets.token_hex(8),
        }
        self._beats, self._taken_by = 0, None
        self._first_at, self._seen, self._changed_at = _now(), None, 0.0  # of the lock that is watched
        self._end, self._thread = threading.Event(), threading.Thread(target=self._keep_fresh, daemon=True)

    def acquire(self) -> bool:
        """Tries once to take the lock; False: try again BEAT_S / 2 later.

        Raises:
            InUse: another process holds it.
        """
        if not self._create():
            holder = _read(self._path)
            if holder is None:  # released in between
                return self.acquire()
            same_machine = holder.get("machine") is not None and holder["machine"] == self._me["machine"]
            gone = same_machine and _started(holder["pid"]) != holder["started"]
            if not gone and not self._watched(holder, same_machine):
                return False
            # Of several processes that take it over, the last one to write keeps it.
            files.write(self._path, self._content())
            time.sleep(SETTLE_S if gone else BEAT_S)
            holder = _read(self._path)
            if not self._is_mine(holder):
                raise InUse(f"{self._workdir} is in use: {_who(holder)} has just taken it over; choose another --workdir")
        self._fresh_at = _now()
        self._thread.start()
        return True

    def _watched(self, holder: dict[str, Any], same_machine: bool) -> bool:
        """Whether another machine's lock has not changed for LEASE_S.

        Raises:
            InUse: its holder lives. One that is about to end, as that of a requeued job, is given LEASE_S to do so.
        """
        changed = holder != self._seen
        if same_machine or (changed and _now() - self._first_at >= LEASE_S):
            raise InUse(f"{self._workdir} is in use: {_who(holder)} trains there; stop it, or choose another --workdir")
        if self._seen is None:
            print(f"{self._workdir} is locked by {_who(holder)}; watching for {LEASE_S:.0f} s if it is alive", flush=True)
        if changed:
            self._seen, self._changed_at = holder, _now()
        return _now() - self._changed_at >= LEASE_S

    def check(self) -> None:
        """Checks that the lock is still held; called before anything is written to the work directory.

        Raises:
            InUse: another process has taken the lock over, while this one was suspended or cut off from the directory.
        """
        if self.held() and _now() - self._fresh_at > LEASE_S:
            self._renew()
        if not self.held():
            raise InUse(
                f"{self._workdir} was taken over by {_who(self._taken_by)} while this process did not respond for "
                f"{LEASE_S:.0f} s; this process stops and writes nothing more"
            )

    def held(self) -> bool:
        """Whether no other process is known to have taken over the lock."""
        return self._taken_by is None

    def release(self) -> None:
        """Ends the thread, and removes the file unless it belongs to another process."""
        self._end.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # what the run has done is not lost by it
            if self._is_mine(_read(self._path)):
                files.remove(self._path)

    def _create(self) -> bool:
        try:
            files.create(self._path, self._content())
        except FileExistsError:
            return self._is_mine(_read(self._path))  # a bucket that is asked twice, if its first answer gets lost
        return True

    def _keep_fresh(self) -> None:
        while self.held() and not self._end.wait(BEAT_S):
            with contextlib.suppress(Exception):  # a disk or bucket that does not answer now; `check` asks before a write
                self._renew()

    def _renew(self) -> None:
        holder = _read(self._path)
        if self._is_mine(holder) or (holder is None and self._create()):
            self._beats += 1
            files.write(self._path, self._content())
            self._fresh_at = _now()
        else:
            self._taken_by = holder or {}

    def _is_mine(self, holder: dict[str, Any] | None) -> bool:
        return holder is not None and holder.get("token") == self._me["token"]

    def _content(self) -> str:
        return json.dumps({**self._me, "beats": self._beats}) + "\n"


@contextlib.contextmanager
def hold(workdir: str) -> Iterator[Lock | None]:
    """Holds the lock of a work directory; of several processes of a run the first one holds it, and the others get None.

    Raises:
        InUse: in every process, where another run holds it.
    """
    lock, refusal, state = Lock(workdir) if processes.is_first() else None, None, WAITING
    while True:
        if lock:
            try:
                files.make_directory(workdir)
                state = HELD if lock.acquire() else WAITING
            except (ConfigError, OSError) as error:
                state, refusal = REFUSED, error
        state = processes.broadcast_from_process_0(state)  # at every look: some backends let nobody wait longer than 30 s
        if state != WAITING:
            break
        time.sleep(BEAT_S / 2)
    if state == REFUSED:
        raise refusal or InUse(f"{workdir} cannot be locked; process 0 says why")
    try:
        yield lock
    finally:
        if lock:
            lock.release()


def _now() -> float:
    """Seconds, counted on while the machine is suspended where the system can do that."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _read(path: str) -> dict[str, Any] | None:
    """The holder; None where there is no lock. A file that is cut off, or no lock, is a holder of whom nothing is known."""
    try:
        text = files.read(path)
    except FileNotFoundError:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    return found if isinstance(found, dict) else {"content": text}


def _who(holder: dict[str, Any] | None) -> str:
    known = holder if holder and {"host", "pid", "since"} <= holder.keys() else None
    return f"process {known['pid']} on {known['host']} since {known['since']}" if known else "an unknown process"


def _machine() -> str | None:
    """Names a boot of a kernel and a namespace of process ids in it, which containers have of their own; None: not known."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process of this machine was started, in ticks since the boot; None where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # a zombie writes nothing any more
