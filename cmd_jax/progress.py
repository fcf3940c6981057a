"""Progress of long jobs on the host: a line with count, speed and remaining time every few seconds."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

EVERY_S = 5.0
T = TypeVar("T")


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"


class Progress:
    """Prints progress towards a known total; the last line has the time taken instead of the time left.

    Args:
        what: first words of every line.
        total: units of the whole job.
        unit: their name; bytes are shown in MB.
        done: units that an earlier, interrupted run has done.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0):
        self._what, self._total, self._unit, self._first, self._done = what, total, unit, done, done
        self._started = self._shown = time.monotonic()

    def advance(self, units: int = 1) -> None:
        self._done += units
        now = time.monotonic()
        if now - self._shown >= EVERY_S and self._done < self._total:
            self._shown = now
            speed = (self._done - self._first) / (now - self._started)
            print(self._line(speed, f"ETA {clock((self._total - self._done) / speed)}"), flush=True)

    def close(self) -> None:
        took = max(time.monotonic() - self._started, 1e-9)
        print(self._line((self._done - self._first) / took, f"took {clock(took)}"), flush=True)

    def _line(self, speed: float, end: str) -> str:
        unit, scale = ("MB", 1e6) if self._unit == "bytes" else (self._unit, 1)
        done, total = (f"{value / scale:,.0f}" for value in (self._done, self._total))
        speed = f"{speed / scale:,.0f}" if speed >= 10 or unit == "MB" else f"{speed:.2g}"
        return f"{self._what}: {done}/{total} {unit}, {speed} {unit}/s, {end}"


def track(items: Iterable[T], what: str, total: int, unit: str = "images") -> Iterator[T]:
    """Yields the items and prints progress."""
    progress = Progress(what, total, unit)
    for item in items:
        yield item
        progress.advance()
    progress.close()
