"""Which kernels take most of a device's time, from a trace of `jax.profiler`."""

import glob
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
from jax.profiler import ProfileData

_SOURCE = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]+)"', re.MULTILINE)


class Kernel(NamedTuple):
    """All executions of one kernel.

    Attributes:
        name: as the device has it; on CPUs and TPUs that of the operation.
        ms: without the kernels that ran inside of it.
        share: of the time of all kernels.
        count: executions.
        source: where in the model the operation that took longest of these stands; empty where that is not known.
    """

    name: str
    ms: float
    share: float
    count: int
    source: str


class Event(NamedTuple):
    """One execution, in nanoseconds; `op` is the operation of the compiled program that it belongs to."""

    name: str
    op: str
    start: float
    duration: float


def record(work: Callable[[], object], directory: str, hlo_text: str = "") -> list[Kernel]:
    """Traces work and returns its kernels, those that take most first.

    Args:
        work: finished when it returns.
        directory: of the trace, which is kept for TensorBoard or Perfetto.
        hlo_text: of the program, `Compiled.as_text()`, for `Kernel.source`.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(directory, profiler_options=options):
        work()
    newest = max(glob.glob(os.path.join(directory, "plugins", "profile", "*", "*.xplane.pb")), key=os.path.getmtime)
    return kernels(lines(ProfileData.from_file(newest)), dict(_SOURCE.findall(hlo_text)))


def lines(trace: ProfileData) -> Iterator[list[Event]]:
    """The kernels of every queue: a GPU's streams, a TPU core's operations, a thread of a CPU."""
    devices = [plane for plane in trace.planes if plane.name.startswith("/device:")]
    of_devices = [line for plane in devices for line in plane.lines]
    queues = [line for line in of_devices if line.name.startswith("Stream")]
    queues = queues or [line for line in of_devices if line.name == "XLA Ops"]
    for line in queues or [line for plane in trace.planes for line in plane.lines]:
        events = []
        for event in line.events:
            op = dict(event.stats).get("hlo_op")
            if op or queues:
                name = event.name.split(" = ")[0].lstrip("%")
                events.append(Event(name, op or name, event.start_ns, event.duration_ns))
        yield events


def kernels(queues: Iterable[list[Event]], sources: dict[str, str]) -> list[Kernel]:
    """Sums up executions by name, those that take most first.

    Args:
        queues: events of a queue each; one may lie inside of another, as those of a loop do.
        sources: by operation.
    """
    total: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    of_op: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for events in queues:
        open_events: list[Event] = []
        for event in sorted(events, key=lambda event: (event.start, -event.duration)):
            while open_events and open_events[-1].start + open_events[-1].duration <= event.start:
                open_events.pop()
            if open_events:
                total[open_events[-1].name] -= event.duration
            open_events.append(event)
            total[event.name] += event.duration
            count[event.name] += 1
            of_op[event.name][event.op] += event.duration
    whole = sum(total.values()) or 1.0
    found = []
    for name in sorted(total, key=total.get, reverse=True):
        longest = max(of_op[name], key=of_op[name].get)
        found.append(Kernel(name, total[name] / 1e6, total[name] / whole, count[name], sources.get(longest, "")))
    return found
