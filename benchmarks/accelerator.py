"""What this machine's accelerator does with the project, in minutes: one command for a GPU or a TPU.

    python -m benchmarks.accelerator --minutes=8 --out=runs/accelerator
    python -m benchmarks.accelerator --minutes=8 --out=runs/accelerator --folder=PHOTOS

Parts, in order of worth: (1) ceiling: large matrix products; (2) agreement: tests that a device can change, and a step in
bfloat16 and with a split state beside one in float32; (3) steps: whole training steps of ViT-S/16, ViT-B/16 and Swin-T, images
from the host and views included; (4) pytorch: `benchmarks.step` in turns with PyTorch, where there is one; (5) variants of the
first step that decide defaults; (6) input: images that one host's threads feed; (7) profile: the kernels that take most; (8)
quality: `benchmarks.quality` on --folder. Each has its share of the minutes that are left and a process of its own; a case that
fails, or takes the device with it, costs itself alone. When the time is over the last parts are left out, and named.

DIR/PART.json has the figures of a part's cases as soon as they are there, DIR/PART.log what its process printed. The same
command again keeps them, and does what is missing. DIR/table.md is for docs/performance.md. The last line is one JSON object.
`utilization` is the share of the fastest bfloat16 product of part 1, FLOPs as `cmd_jax.training.flops` counts them. On a CPU
all sizes are toys: that shows that the command works, and nothing else.
"""

import argparse
import contextlib
import datetime
import functools
import json
import multiprocessing
import os
import platform as host_platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks.accelerator_parts import FULL, PARTS, TOY, LeftOut, Part
from cmd_jax import files

LEAST_S = 20  # of a part: less does not start a process and compile a step
GRACE_S = 30  # for what is asked to stop
MEMORY_SHARE = "0.92"  # of a GPU, for a process that has it to itself
Record = dict[str, Any]
_FORK = multiprocessing.get_context("fork")  # the libraries are imported once, and no device is touched before


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/accelerator"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--folder", metavar="PHOTOS", help="of train/CLASS/* and test/CLASS/*, for the last part and the input")
    return parser


def describe_device(out: Path) -> None:
    """Writes what the other parts run on."""
    first = jax.devices()[0]
    found = {
        "platform": first.platform,
        "kind": first.device_kind,
        "devices": jax.device_count(),
        "memory_bytes": (first.memory_stats() or {}).get("bytes_limit"),
        "backend": first.client.platform_version.splitlines()[0],
        "jax": jax.__version__,
        "python": host_platform.python_version(),
        "cores": os.cpu_count(),
    }
    write(out / "device.json", found)


def write(path: Path, content: Record) -> None:
    """As JSON, whole or not at all."""
    files.write(str(path), json.dumps(content, indent=2) + "\n")


def read(path: Path) -> Record:
    """Empty where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


@contextlib.contextmanager
def process(work: Callable[[], None], log: Path) -> Iterator[multiprocessing.Process]:
    """A child process in a session of its own, whose output goes to a file; with all that it has started it ends with the
    block."""

    def child() -> None:
        os.setsid()
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        work()

    sys.stdout.flush()
    started = _FORK.Process(target=child)
    started.start()
    try:
        yield started
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, number)
            started.join(GRACE_S)


def finished(figures: Record) -> bool:
    """Whether a later call leaves a case as it is."""
    return not {"error", "out_of_time_s", "left_out"} & figures.keys()


def run_cases(
    part: Part, cases: dict[str, Callable[[], Record]], names: list[str], args: argparse.Namespace, deadline: float
) -> None:
    """The process of a part: measures these cases, one after the other."""
    if not part.on_device:  # it waits for what it has started, whose processes may be in sessions of their own
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "true" if part.on_device else "false"}
    os.environ |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY_SHARE, "CMD_JAX_TEST_CACHE": str(args.out / "compiled")}
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]  # of tests that run this command
    jax.config.update("jax_compilation_cache_dir", str(args.out / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    path, begun = args.out / f"{part.name}.json", time.monotonic()
    record = read(path)
    for number, name in enumerate(names):
        usual_s = (time.monotonic() - begun) / max(1, number)
        if time.monotonic() + usual_s > deadline:
            return
        write(path, record | {"running": name})
        started = time.monotonic()
        try:
            figures = cases[name]() | {"seconds": time.monotonic() - started}
        except LeftOut as reason:
            figures = {"left_out": str(reason)}
        except Exception as error:  # of any kind: it must not end the other cases
            figures = {"error": f"{type(error).__name__}: {error}"[:1000]}
        record["cases"][name] = figures
        write(path, record)


def open_cases(record: Record, cases: dict[str, Callable[[], Record]]) -> list[str]:
    """Those that have no figures, the ones that were never tried first."""
    tried = record.get("cases", {})
    return sorted((name for name in cases if not finished(tried.get(name, {"error": ""}))), key=lambda name: name in tried)


def run_part(part: Part, cases: dict[str, Callable[[], Record]], args: argparse.Namespace, limit_s: float) -> None:
    """Gives a part its time. A process that dies is followed by another one, which does the cases after the deadly one."""
    path, deadline = args.out / f"{part.name}.json", time.monotonic() + limit_s
    waiting = open_cases(read(path), cases)
    write(path, {"cases": {}} | read(path))
    while waiting and time.monotonic() < deadline:
        work = functools.partial(run_cases, part, cases, waiting, args, deadline)
        with process(work, args.out / f"{part.name}.log") as child:
            child.join(max(0.0, deadline - time.monotonic()))
            code = child.exitcode
        record = read(path)
        running = record.pop("running", None)
        if running is None:
            return
        died = {"error": f"its process ended with code {code}; see {part.name}.log"}
        record["cases"][running] = {"out_of_time_s": limit_s} if code is None else died
        write(path, record)
        waiting = waiting[waiting.index(running) + 1 :]


def run(args: argparse.Namespace) -> Record:
    """All parts, and everything that is known of them."""
    started = time.monotonic()
    end = started + 60 * args.minutes
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    before = read(args.out / "device.json")
    with process(lambda: describe_device(args.out), args.out / "device.log") as child:
        child.join(end - time.monotonic())
    device = read(args.out / "device.json")
    if child.exitcode or not device:
        sys.exit(f"error: no device within {args.minutes:g} minutes; {args.out / 'device.log'} says why")
    if before and before["kind"] != device["kind"]:
        sys.exit(f"error: {args.out} has figures of {before['kind']}, but this is {device['kind']}; give another --out")
    platform, left_out = device["platform"], []
    sizes = TOY if platform == "cpu" else FULL
    print(f"{device['devices']} x {device['kind']}, {args.minutes:g} minutes{', toy sizes' * (sizes is TOY)}", flush=True)
    for number, part in enumerate(PARTS):
        cases, left_s = part.cases(sizes, args, platform), end - time.monotonic()
        missing = open_cases(read(args.out / f"{part.name}.json"), cases)
        if missing and left_s >= LEAST_S:
            limit_s = max(LEAST_S, left_s * part.share / sum(later.share for later in PARTS[number:]))
            run_part(part, cases, args, limit_s)
        found = read(args.out / f"{part.name}.json").get("cases", {})
        print(f"\n({number + 1}) {part.name}{'' if missing else ', kept from an earlier call'}", flush=True)
        for name in cases:
            print(f"  {name}: {text(found.get(name, {}))}", flush=True)
        left_out += [part.name] if missing and not found else []
    parts = {part.name: read(args.out / f"{part.name}.json").get("cases", {}) for part in PARTS}
    add_utilization(parts)
    return {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "sizes": "toy" if sizes is TOY else "full",
        "minutes": round((time.monotonic() - started) / 60, 2),
        "left_out": left_out,
        "parts": parts,
    }


def add_utilization(parts: Record) -> None:
    """Adds to each step its share of the fastest product in bfloat16."""
    rates = [figures.get("tflop_per_s", 0.0) for name, figures in parts["ceiling"].items() if name.startswith("bfloat16")]
    for figures in (figures for cases in parts.values() for figures in cases.values()):
        if "model_tflop_per_s" in figures and any(rates):
            figures["utilization"] = figures["model_tflop_per_s"] / max(rates)


def text(figures: Record) -> str:
    """The numbers of a case in one line."""
    if not figures:
        return "no time left"
    plain = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
    shown = {name: value for name, value in figures.items() if isinstance(value, int | float | str) and name != "seconds"}
    return ", ".join(f"{name} {plain(value)}" for name, value in shown.items()) or "done"


def table(result: Record) -> str:
    """In Markdown."""
    device = result["device"]
    lines = [
        f"{device['devices']} x {device['kind']}, {device['backend']}, jax {device['jax']}, {result['date']}"
        f"{', toy sizes' * (result['sizes'] == 'toy')}; left out: {', '.join(result['left_out']) or 'nothing'}.",
        "",
        "| part | case | figures |",
        "|---|---|---|",
    ]
    for part, cases in result["parts"].items():
        lines += [f"| {part} | {name} | {text(figures)} |" for name, figures in cases.items()]
        for figures in cases.values():
            for kernel in figures.get("kernels", ()):
                lines.append(f"| | `{kernel['name']}` | {text(kernel)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the command line."""
    args = parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the part that runs is ended too
    result = run(args)
    files.write(str(args.out / "table.md"), table(result))
    print(f"\nwrote table.md to {args.out}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
