"""The measured side of a benchmark in a process of its own, and the parent's handle on it.

One JSON line on stdout when the step is warm, then one for every line `N` on stdin: the figures of N more steps. Both sides
of a comparison speak this, so that the parent can alternate them without either seeing the other's memory or threads.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import TextIO


def claim_stdout() -> TextIO:
    """Keeps stdout for the replies alone: whatever prints there from now on, C libraries included, goes to stderr."""
    sys.stdout.flush()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def _reset_peak() -> bool:
    """Sets the process's peak resident memory to its present one; False where the kernel does not offer that."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _peak_rss_bytes() -> int:
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(step: Callable[[], object], count: int) -> dict:
    """Runs the step `count` times: {"wall_s", "cpu_s": of every step, "peak_rss_bytes", "peak_rss_since": start | request}.

    CPU seconds are summed over the process's threads.
    """
    reset = _reset_peak()
    wall_s, cpu_s = [], []
    for _ in range(count):
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        wall_s.append(time.perf_counter() - wall)
        cpu_s.append(time.process_time() - cpu)
    since = "request" if reset else "start"
    return {"wall_s": wall_s, "cpu_s": cpu_s, "peak_rss_bytes": _peak_rss_bytes(), "peak_rss_since": since}


def serve(
    step: Callable[[], object], info: dict, *, replies: TextIO | None = None, extra: Callable[[], dict] = lambda: {}
) -> None:
    """Answers requests for steps until stdin ends.

    Args:
        step: one step, finished when it returns; the caller has warmed it up.
        info: the first line, of what JSON can hold.
        replies: of an earlier `claim_stdout`, for who prints before it serves.
        extra: called after each request; its entries join the reply.
    """
    with replies or claim_stdout() as replies:
        print(json.dumps(info), file=replies, flush=True)
        for line in sys.stdin:
            print(json.dumps({**measure(step, int(line)), **extra()}), file=replies, flush=True)


class Worker:
    """A serving child process; `info` is its first line.

    with Worker([sys.executable, "-m", "benchmarks.torch_step", "--serve"]) as worker:
        seconds = worker.run(3)["wall_s"]
    """

    def __init__(self, argv: list[str], env: dict[str, str] | None = None) -> None:
        """env: the child's whole environment; None is the parent's."""
        self._argv = argv
        # a file: a pipe that nobody reads would fill and stop the child
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._child = subprocess.Popen(
            argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True
        )
        self.info = self._reply()

    def _reply(self) -> dict:
        line = self._child.stdout.readline()
        if line.endswith("\n"):
            return json.loads(line)
        self.close()
        raise RuntimeError(f"{' '.join(self._argv)} ended with code {self._child.returncode}; its stderr ends:\n{self._tail}")

    def run(self, count: int) -> dict:
        """Figures of `count` more steps, see `measure`."""
        with contextlib.suppress(BrokenPipeError):  # of a dead child, which the missing reply tells
            self._child.stdin.write(f"{count}\n")
            self._child.stdin.flush()
        return self._reply()

    def close(self) -> None:
        """Ends the child; harmless when repeated."""
        if self._stderr.closed:
            return
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            self._child.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()
        self._stderr.seek(0)
        self._tail = self._stderr.read()[-4000:]
        self._stderr.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
