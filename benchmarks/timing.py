"""What benchmarks share: settings of the command line, and processes that are timed in turn.

Each side of a comparison is a process of its own (`serve`), so that it sees neither the memory nor the threads of the other. It
prints one JSON line when its step is warm, then one for each line `N` on stdin: the seconds and memory of N more steps. The
parent (`alternate`) lets the sides take turns, so that all of them meet the same state of the machine.
"""

import ast
import contextlib
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

ROOT = Path(__file__).parents[1]
# For both sides: huge pages for large blocks, without which most of a difference would be page faults.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Spread(NamedTuple):
    """Median, smallest and largest value of some rounds."""

    median: float
    low: float
    high: float


def spread_of(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


def parse_value(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def set_values(config: Any, settings: Sequence[str]) -> None:
    """Sets "section.key=value" each in a ConfigDict, as the flag --config.section.key=value does.

    Raises:
        KeyError: unknown key.
    """
    for item in settings:
        key, _, text = item.partition("=")
        section, name = key.split(".")
        if name not in config[section]:
            raise KeyError(f"unknown config key {key}")
        config[section][name] = parse_value(text)


def torch_python(given: str | None = None) -> str | None:
    """A Python with PyTorch and transformers: the given one, else that of .venv-interop, else this one; None where there is
    none, or for "none"."""
    built = ROOT / ".venv-interop" / "bin" / "python"
    here = sys.executable if all(map(importlib.util.find_spec, ("torch", "transformers"))) else None
    python = given or (str(built) if built.exists() else here)
    if python in (None, "none"):
        print("no Python with PyTorch: only our side is measured; `make .venv-interop/.installed` builds one")
        return None
    return python


def use_one_core() -> None:
    """Keeps this process and its children on the last core of the CPU."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def claim_stdout() -> TextIO:
    """Keeps stdout for replies: all else that prints there, C libraries included, goes to stderr."""
    sys.stdout.flush()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def serve(step: Callable[[], object], info: dict, replies: TextIO, extra: Callable[[], dict] = dict) -> None:
    """Answers requests for steps until stdin ends.

    Args:
        step: one step, finished when it returns; warmed up by the caller.
        info: the first line.
        replies: of `claim_stdout`.
        extra: called after each request; its entries join the reply.
    """
    with replies:
        print(json.dumps(info), file=replies, flush=True)
        for line in sys.stdin:
            print(json.dumps(_measure(step, int(line)) | extra()), file=replies, flush=True)


def _measure(step: Callable[[], object], count: int) -> dict:
    """{"wall_s", "cpu_s": of each step, all threads together; "peak_rss_bytes": during these steps where Linux can tell}"""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts at the present size
    wall_s, cpu_s = [], []
    for _ in range(count):
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        wall_s.append(time.perf_counter() - wall)
        cpu_s.append(time.process_time() - cpu)
    return {"wall_s": wall_s, "cpu_s": cpu_s, "peak_rss_bytes": _peak_rss_bytes()}


def _peak_rss_bytes() -> int:
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Worker:
    """A serving child process; `info` is its first line.

    Args:
        argv: of the child.
        env: variables beside those of this process.
    """

    def __init__(self, argv: list[str], env: dict[str, str] | None = None) -> None:
        self._argv = argv
        # A file: the child would block on a full pipe that nobody reads.
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._child = subprocess.Popen(
            argv, env=os.environ | (env or {}), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True
        )
        self.info = self._reply()

    def _reply(self) -> dict:
        line = self._child.stdout.readline()
        if line.endswith("\n"):
            return json.loads(line)
        self.close()
        raise RuntimeError(f"{' '.join(self._argv)} ended with code {self._child.returncode}; its stderr ends:\n{self._tail}")

    def run(self, count: int) -> dict:
        """The reply for `count` more steps, see `_measure`."""
        with contextlib.suppress(BrokenPipeError):  # the missing reply tells that the child has died
            self._child.stdin.write(f"{count}\n")
            self._child.stdin.flush()
        return self._reply()

    def close(self) -> None:
        """Ends the child; may be called again."""
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


class Timed(NamedTuple):
    """A side of a comparison: its first line, and its replies of one step each."""

    info: dict
    replies: list[dict]

    def seconds(self, clock: str) -> list[float]:
        """ "wall_s" or "cpu_s" of every round."""
        return [second for reply in self.replies for second in reply[clock]]

    def peak_bytes(self) -> int:
        """Largest memory of a round: of the accelerator where the side reports it, else resident memory."""
        return max(reply.get("device_peak_bytes", reply["peak_rss_bytes"]) for reply in self.replies)


def alternate(sides: dict[str, tuple[list[str], dict[str, str]]], rounds: int, warm: int = 1) -> dict[str, Timed]:
    """Times processes that take turns.

    Args:
        sides: argv and environment by name.
        rounds: of one step on every side.
        warm: further rounds before them, which do not count.
    """
    workers: dict[str, Worker] = {}
    try:
        for name, (argv, env) in sides.items():
            workers[name] = Worker(argv, HUGE_PAGES | env)
        timed = {name: Timed(worker.info, []) for name, worker in workers.items()}
        for number in range(warm + rounds):
            for name, worker in workers.items():
                reply = worker.run(1)
                timed[name].replies.extend([reply] if number >= warm else [])
    finally:
        for worker in workers.values():
            worker.close()
    return timed
