"""What `benchmarks.accelerator` measures: a part is a table of named cases, each a function that returns figures."""

import argparse
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import input_pipeline, kernels
from benchmarks import step as given_crops
from benchmarks.timing import ROOT, set_values, spread_of, torch_python
from benchmarks.tpu_compile import IMAGES, memory_of
from cmd_jax import config as config_lib
from cmd_jax.data.cache import Batch
from cmd_jax.data.loader import CanvasCache
from cmd_jax.training.dry_run import product_rate
from cmd_jax.training.flops import model_flops
from cmd_jax.training.run import Run, build_run
from cmd_jax.training.sharding import all_hardware

Figures = dict[str, Any]
Settings = tuple[str, ...]
GIB = 2**30
TOP = 10  # kernels that are listed
LOSSES_AGREE = {"split state": 1e-3, "bfloat16": 3e-2}  # relative, after three steps
TINY = (
    "model.name=vit_micro",
    "model.patch_size=8",
    "model.drop_path=0.0",
    "data.canvas_px=32",
    "views.global_px=16",
    "views.local_px=8",
    "views.local_count=0",  # half of the time to trace and compile
    "head.prototypes=24",
    "head.hidden_dim=16",
    "head.bottleneck_dim=8",
    "method.mil_hidden_dim=8",
)


class LeftOut(Exception):
    """A case cannot be measured here, and why."""


class Step(NamedTuple):
    """A training step that is timed.

    Attributes:
        settings: section.key=value.
        images: of the batch, on each device.
        compiler: options of it, beside those of a run.
    """

    settings: Settings
    images: int
    compiler: dict[str, Any] = {}

    def changed(self, *settings: str) -> "Step":
        return self._replace(settings=(*self.settings, *settings))


class Sizes(NamedTuple):
    """How large everything is: `FULL` on an accelerator, `TOY` on a CPU.

    Attributes:
        products: sides of the square matrices.
        tests: arguments of pytest by case.
        steps: by case; the first one is varied and profiled.
        variants: of it, by case.
        torch: arguments of `benchmarks.step`.
        torch_cases: METHOD:K:BATCH each.
        photos: images that go through the input pipeline, and the size of a batch.
        round_s: seconds of a timed round.
        quality: arguments of `benchmarks.quality`.
    """

    products: tuple[int, ...]
    tests: dict[str, Sequence[str]]
    steps: dict[str, Step]
    variants: dict[str, Step]
    torch: Sequence[str]
    torch_cases: Sequence[str]
    photos: tuple[int, int]
    round_s: float
    quality: Sequence[str]


def _vit_s(method: str, prototypes: int, images: int) -> Step:
    return Step(("model.name=vit_small", f"method.name={method}", f"head.prototypes={prototypes}"), images)


CMD = _vit_s("cmd", 65_536, 64)
FULL = Sizes(
    products=(4096, 8192, 16_384),
    tests={
        "objective": ["tests/method/test_objective.py"],
        "streamed and plain": ["tests/method/test_streamed.py"],
        "references": ["tests/parity/test_check.py"],
        "step": ["tests/training/test_step.py"],
        "resume": ["tests/training/test_train.py", "-k", "resumes"],
    },
    steps={
        "cmd, K = 65,536": CMD,
        "cmd, K = 8,192": _vit_s("cmd", 8192, 64),
        "cmd, K = 65,536, 256 images": _vit_s("cmd", 65_536, 256),
        "dino, K = 65,536": _vit_s("dino", 65_536, 64),
        "cmd, K = 8,192, 256 images": _vit_s("cmd", 8192, 256),
        "dino, K = 8,192": _vit_s("dino", 8192, 64),
        "ViT-B/16 from weights": Step(("model.name=vit_base", "method.name=cmd", "init.weights=given"), 64),
        "Swin-T": Step(("model.name=swin_tiny", "method.name=cmd", "head.prototypes=65536"), 64),
        "dino, K = 65,536, 256 images": _vit_s("dino", 65_536, 256),
        "dino, K = 8,192, 256 images": _vit_s("dino", 8192, 256),
    },
    variants={
        "default": CMD,
        # What `training.run.GPU_COMPILER_OPTIONS` costs.
        "compiler's own options": CMD._replace(
            compiler={"xla_gpu_deterministic_ops": False, "xla_gpu_enable_triton_gemm": True}
        ),
        "attention xla": CMD.changed("model.attention=xla"),
        "views apart": CMD.changed("model.packed_views=False"),
        "views packed": CMD.changed("model.packed_views=True"),
        "blocks scanned": CMD.changed("model.scan_blocks=True"),
        "targets gathered": CMD.changed("method.matched_targets=gathered"),
        "chunk 4,096": CMD.changed("method.prototype_chunk=4096"),
        "chunk 16,384": CMD.changed("method.prototype_chunk=16384"),
        "remat dots": CMD.changed("model.remat=dots"),
        "remat full": CMD.changed("model.remat=full"),
    },
    torch=("--model=vit_small", "--dtype=bfloat16", "--device=cuda", "--compile"),
    torch_cases=("cmd:65536:64", "cmd:8192:64", "dino:65536:64"),
    photos=(512, 64),
    round_s=1.0,
    quality=(),
)
TOY_STEP = Step((*TINY, "method.name=cmd", "model.dtype=float32"), 8)
TOY = Sizes(
    products=(64,),
    tests={"objective": ["tests/method/test_centers.py", "-k", "leading"]},
    steps={"cmd": TOY_STEP},
    variants={"default": TOY_STEP},
    torch=("--model=vit_micro", "--local_count=1", "--global_px=16", "--local_px=8", "--rounds=1"),
    torch_cases=("cmd:24:2",),
    photos=(4, 2),
    round_s=0.01,
    quality=[
        "--baselines=dino",
        "--seeds=0",
        *(f"--set={item}" for item in (*TINY[1:], "train.batch_size=8", "train.epochs=1")),
    ],
)


def ceiling(sizes: Sizes) -> dict[str, Callable[[], Figures]]:
    """Large matrix products."""
    rate = lambda dtype, side: {"tflop_per_s": product_rate(dtype, side) / 1e12}
    cases = {f"bfloat16, {side:,}": functools.partial(rate, "bfloat16", side) for side in sizes.products}
    return cases | {f"float32, {sizes.products[0]:,}": functools.partial(rate, "float32", sizes.products[0])}


class Compiled(NamedTuple):
    """A step that is compiled for all devices, and the images that it takes: noise."""

    run: Run
    program: jax.stages.Compiled
    batch: Batch
    compile_s: float


def compiled(case: Step) -> Compiled:
    """Compiles a step."""
    config, hardware = config_lib.default(), all_hardware()
    set_values(config, (*case.settings, f"train.batch_size={case.images * hardware.devices}"))
    run = build_run(config, range(IMAGES), hardware)
    started = time.perf_counter()
    program = run.lower().compile(case.compiler or None)
    compile_s = time.perf_counter() - started
    count, side = run.config.train.batch_size, run.config.data.canvas_px
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    batch = Batch(pixels, np.full((count, 2), side, np.int32), np.arange(count, dtype=np.int32))
    return Compiled(run, program, run.place(batch), compile_s)


def trainer(step: Compiled) -> Callable[[int], float]:
    """A function that trains a number of steps, one after the other, and returns their seconds."""
    state = step.run.first_state()

    def train(count: int) -> float:
        nonlocal state
        started = time.perf_counter()
        for _ in range(count):
            state, metrics = step.program(state, step.batch)
        loss = float(metrics["loss"])
        seconds = time.perf_counter() - started
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        return seconds

    return train


def time_step(case: Step, round_s: float) -> Figures:
    """Images a second, arithmetic and memory of a whole step, views included."""
    step = compiled(case)
    train = trainer(step)
    train(1)
    count = max(1, min(50, round(round_s / train(1))))
    median, low, high = spread_of([train(count) / count for _ in range(3)])
    config, devices = step.run.config, step.run.shardings.mesh.size
    images = config.train.batch_size
    return {
        "images_per_s": images / median,
        "step_ms": 1e3 * median,
        "step_ms_range": [1e3 * low, 1e3 * high],
        "model_tflop_per_s": images / median * model_flops(config) / devices / 1e12,
        "peak_gib": sum(memory_of(step.program)) / GIB,
        "compile_s": step.compile_s,
        "images": images,
        "chunk": config.method.prototype_chunk,
        "speed": {key: config.model[key] for key in ("dtype", "attention", "packed_views", "scan_blocks", "remat")},
    }


def timed(cases: dict[str, Step], sizes: Sizes, platform: str) -> dict[str, Callable[[], Figures]]:
    """`time_step` of every case that this platform's compiler takes; the options here are a GPU's."""
    cases = {name: case for name, case in cases.items() if platform == "gpu" or not case.compiler}
    return {name: functools.partial(time_step, case, sizes.round_s) for name, case in cases.items()}


def agreement(sizes: Sizes, out: Path) -> dict[str, Callable[[], Figures]]:
    """The tests that a device can change, and a step in float32, in bfloat16 and, on several devices, with a split state."""
    tests = {f"tests: {name}": functools.partial(run_tests, arguments, out) for name, arguments in sizes.tests.items()}
    return {"losses of steps": losses_agree} | tests


def losses_agree() -> Figures:
    """Losses after three steps on all devices, from one state."""
    cases = {"float32": (), "bfloat16": ("model.dtype=bfloat16",)}
    if jax.device_count() > 1:
        cases["split state"] = ("mesh.shard_state=True",)
    losses, first = {}, None
    for name, settings in cases.items():
        run, program, batch, _ = compiled(TOY_STEP.changed(*settings))
        first = jax.device_get(first or run.first_state())
        state = jax.device_put(first, run.shardings.of_state(first))
        for _ in range(3):
            state, metrics = program(state, batch)
        losses[name] = float(metrics["loss"])
    for name, most in LOSSES_AGREE.items():
        if not abs(losses.get(name, losses["float32"]) - losses["float32"]) <= most * abs(losses["float32"]):
            raise ArithmeticError(f"the loss after three steps differs by more than {most:g} of it: {losses}")
    return {"losses": losses}


class _Reports:
    """A plugin of pytest that counts."""

    def __init__(self) -> None:
        self.outcomes = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            self.outcomes[report.outcome] += 1
        if report.failed:
            self.pytest_collectreport(report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            reason = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
            self.failures.append(f"{report.nodeid}: {reason}"[:300])


def run_tests(arguments: Sequence[str], out: Path) -> Figures:
    """Tests in this process, and so on this device."""
    if not importlib.util.find_spec("pytest"):
        raise LeftOut("no pytest in this Python; pip install '.[dev]'")
    import pytest

    os.chdir(ROOT)
    reports, options = _Reports(), ["-p", "no:cacheprovider", f"--rootdir={ROOT}", f"--basetemp={out / 'pytest'}"]
    code = pytest.main([*arguments, *options], plugins=[reports])
    if not sum(reports.outcomes.values()):
        raise RuntimeError(f"pytest ran no test and ended with code {code}")
    return reports.outcomes | {"failures": reports.failures}


def torch_steps(sizes: Sizes, device: str) -> dict[str, Callable[[], Figures]]:
    """`benchmarks.step` with both sides on this device."""

    def measure(case: str) -> Figures:
        python = torch_python()
        if device == "tpu" or not python:
            raise LeftOut("no Python with PyTorch and transformers for this device")
        args = given_crops.parser().parse_args([*sizes.torch])
        return given_crops.measure(args, case, python)

    return {case: functools.partial(measure, case) for case in sizes.torch_cases}


def feed(sizes: Sizes, folder: str | None) -> dict[str, Callable[[], Figures]]:
    """What one host's threads feed to a device, in the first epoch and from the cache."""

    def measure() -> Figures:
        encoded = input_pipeline.encoded_images(folder, sizes.photos[0])
        batch = min(sizes.photos[1], len(encoded))
        images = len(encoded) // batch * batch
        config = config_lib.default()
        config.data.cache = "ram"
        threads = os.cpu_count()
        cache = CanvasCache(input_pipeline.Images(encoded), config.data)
        first = input_pipeline.read(cache, images, batch, threads, 1)
        for index in range(images):  # those that the look-ahead had not reached
            cache.load(index)
        cached = input_pipeline.read(cache, images, batch, threads, input_pipeline.CACHED_EPOCHS)
        return {
            "first_epoch_images_per_s": first.images_per_s,
            "cached_images_per_s": cached.images_per_s,
            "threads": threads,
            "picture_kbytes": statistics.mean(map(len, encoded)) / 1e3,
        }

    return {"one host": measure}


def profile(sizes: Sizes, out: Path) -> dict[str, Callable[[], Figures]]:
    """The kernels that take most of the first step's time."""
    name, case = next(iter(sizes.steps.items()))

    def measure() -> Figures:
        step, steps = compiled(case), 3
        train = trainer(step)
        train(2)
        seconds = []
        found = kernels.record(lambda: seconds.append(train(steps)), str(out / "trace"), step.program.as_text())
        devices = step.run.shardings.mesh.size
        listed = [
            {"name": kernel.name, "ms_a_step": kernel.ms / steps / devices, "share": kernel.share, "source": kernel.source}
            for kernel in found[:TOP]
        ]
        busy = sum(kernel.ms for kernel in found) / steps / devices
        return {"step_ms": 1e3 * seconds[0] / steps, "busy_ms": busy, "kernels": listed}

    return {name: measure}


def quality(sizes: Sizes, out: Path, folder: str | None) -> dict[str, Callable[[], Figures]]:
    """`benchmarks.quality` on a folder; a later call continues it."""

    def measure() -> Figures:
        if not folder:
            raise LeftOut("no --folder=PHOTOS")
        command = [sys.executable, "-m", "benchmarks.quality", f"--folder={folder}", f"--out={out / 'quality'}", *sizes.quality]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            try:
                printed, _ = process.communicate()
            except KeyboardInterrupt:  # it was asked to stop too, and saves what it has
                process.wait()
                raise
        if process.returncode:
            raise RuntimeError(f"benchmarks.quality ended with code {process.returncode}")
        return {"rows": json.loads(printed.splitlines()[-1])["rows"]}

    return {"folder": measure}


class Part(NamedTuple):
    """A part of the battery.

    Attributes:
        name: of its files.
        share: of the time that is left when its turn comes, beside the shares of the parts after it.
        on_device: whether its process takes the device, or leaves it to others that it starts.
        cases: from sizes, command line and platform.
    """

    name: str
    share: int
    cases: Callable[[Sizes, argparse.Namespace, str], dict[str, Callable[[], Figures]]]
    on_device: bool = True


# In order of worth.
PARTS = (
    Part("ceiling", 1, lambda sizes, args, platform: ceiling(sizes)),
    Part("agreement", 3, lambda sizes, args, platform: agreement(sizes, args.out)),
    Part("steps", 8, lambda sizes, args, platform: timed(sizes.steps, sizes, platform)),
    Part("pytorch", 3, lambda sizes, args, platform: torch_steps(sizes, platform), on_device=False),
    Part("variants", 5, lambda sizes, args, platform: timed(sizes.variants, sizes, platform)),
    Part("input", 1, lambda sizes, args, platform: feed(sizes, args.folder)),
    Part("profile", 2, lambda sizes, args, platform: profile(sizes, args.out)),
    Part("quality", 2, lambda sizes, args, platform: quality(sizes, args.out, args.folder), on_device=False),
)
