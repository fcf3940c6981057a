"""Commands in processes of their own, some side by side, each with a log of when it said what."""

import collections
import os
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.quality_plan import ROOT
from cmd_jax.progress import clock

POLL_S = 0.2
TAIL = 12  # lines of the log of a job that failed
STARTED = "started: "
_STEP = re.compile(r"^ *([0-9.]+) step ([0-9]+)/")


class Job(NamedTuple):
    """A command.

    Attributes:
        name: for people.
        command: to run in the root of the repository.
        log: file that its output is added to, each line behind the seconds since its start.
    """

    name: str
    command: list[str]
    log: str


class _Child:
    """A job that runs; a thread carries its output to the log."""

    def __init__(self, job: Job, environment: dict[str, str]):
        self.job, self.started = job, time.monotonic()
        os.makedirs(os.path.dirname(job.log), exist_ok=True)
        self._log = open(job.log, "a", encoding="utf-8")  # noqa: SIM115
        print(f"{STARTED}{' '.join(job.command)}", file=self._log, flush=True)
        # A session of its own: Ctrl-C reaches this process alone, which asks its children to stop, once.
        self.process = subprocess.Popen(
            job.command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def _carry(self) -> None:
        for line in self.process.stdout:
            print(f"{self.seconds():9.2f} {line.rstrip()}", file=self._log, flush=True)

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def close(self) -> int:
        """Waits for its end and returns its code."""
        code = self.process.wait()
        self._thread.join()
        self.process.stdout.close()
        self._log.close()
        return code


def run_jobs(jobs: Sequence[Job], at_once: int, say: Callable[[str], None] = print) -> dict[str, int]:
    """Runs all jobs, also when one fails; asked to stop (KeyboardInterrupt), it asks those that run and waits for them.

    Args:
        jobs: in their order.
        at_once: how many run side by side.
        say: gets a line when one starts or ends, and the last lines of one that failed.

    Returns:
        Code of every job that failed, by name.
    """
    waiting, running = collections.deque(jobs), list[_Child]()
    seconds, failed = [], {}
    environment = dict(os.environ)
    if at_once > 1:  # the first one would take the whole memory of a GPU
        environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    def place() -> str:
        left = len(waiting) + len(running)
        if not seconds or not left:
            return f"{len(jobs) - left} of {len(jobs)} done"
        elapsed = sum(child.seconds() for child in running)
        remaining = max(0.0, left * statistics.mean(seconds) - elapsed) / min(at_once, left)
        return f"{len(jobs) - left} of {len(jobs)} done, ETA {clock(remaining)}"

    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_Child(waiting.popleft(), environment))
                say(f"started   {running[-1].job.name} ({place()})")
            time.sleep(POLL_S)
            for child in [child for child in running if child.process.poll() is not None]:
                running.remove(child)
                took, code = child.seconds(), child.close()
                if code:
                    failed[child.job.name] = code
                    say(f"failed    {child.job.name} with code {code} after {clock(took)}; {child.job.log} ends:")
                    say("\n".join(f"    {line}" for line in tail(child.job.log)))
                    continue
                seconds.append(took)
                say(f"finished  {child.job.name} in {clock(took)} ({place()})")
    finally:
        _stop(running)
    return failed


def _stop(children: Sequence[_Child]) -> None:
    try:
        for child in children:
            child.process.terminate()
        for child in children:
            child.close()
    except BaseException:  # asked again
        for child in children:
            child.process.kill()
        raise


def tail(log: str) -> list[str]:
    """The last lines of a log."""
    with open(log, encoding="utf-8", errors="replace") as file:
        return [line.rstrip() for line in collections.deque(file, TAIL)]


def seconds_per_step(log: str) -> float | None:
    """Median over neighbouring lines about steps; an evaluation between two of them leaves its own lines, and they out.

    Returns:
        None of a log without such neighbours.
    """
    found, before = [], None
    if not os.path.exists(log):
        return None
    with open(log, encoding="utf-8", errors="replace") as file:
        for line in file:
            match = _STEP.match(line)
            now = (float(match[1]), int(match[2])) if match else None
            if now and before and now[1] > before[1]:
                found.append((now[0] - before[0]) / (now[1] - before[1]))
            before = now
    return statistics.median(found) if found else None
