"""Shared by all tests: a tiny configuration, a folder of photos, a cache of compiled programs, and the order of long tests."""

import fcntl
import itertools
import os
import re
import shutil
import tempfile

import jax
import numpy as np
import pytest

from cmd_jax.config import default

# For programs that are compiled more often than run: code generation would take most of their time.
QUICK = (
    ("xla_backend_optimization_level", 0),
    ("xla_cpu_use_fusion_emitters", False),
    ("xla_cpu_parallel_codegen_split_count", 1),
)
QUICK_FLAGS = " ".join(f"--{name}={value}" for name, value in QUICK)  # for a whole process
# What no train step reads: which images there are, and what becomes of its results.
BESIDE_THE_STEP = re.compile(
    r"eval\..*|data\.(folder|eval_folder|cache|cache_dir|decode_threads)"
    r"|train\.(log_every_steps|checkpoint_every_epochs|keep_checkpoints|best_metric|stop_on_collapse)"
)


def quick(function, **options):
    """`jax.jit` for such programs. An eager network would be one program for each shape of each operation instead."""
    return jax.jit(function, compiler_options=dict(QUICK), **options)


def normal(seed, *shape):
    """Standard normal float32 numbers; JAX would compile a program for each shape."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pytest_configure(config):
    """Programs that several tests compile, in whatever process, are compiled once: in a directory that CMD_JAX_TEST_CACHE
    names, for several calls, or in one of this call."""
    if not hasattr(config, "workerinput"):
        cache = os.environ.get("CMD_JAX_TEST_CACHE")
        if not cache:
            cache = config.compile_cache = tempfile.mkdtemp(prefix="compiled-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
        # JAX has read the variables of this process already.
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def pytest_unconfigure(config):
    if hasattr(config, "compile_cache"):
        shutil.rmtree(config.compile_cache, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Two processes get half of the tests each (`--dist worksteal`), and the long ones begin the halves: none of them is left
    at the end, when the other process has nothing to do. Those that share something stay together."""
    shared = lambda item: item.get_closest_marker("long").args or item.nodeid
    long = [item for item in items if item.get_closest_marker("long")]
    others = [item for item in items if not item.get_closest_marker("long")]
    groups = [list(group) for _, group in itertools.groupby(long, shared)]
    first, second = (list(itertools.chain(*groups[start::2])) for start in (0, 1))
    rest = max(0, len(items) // 2 - len(first))
    items[:] = first + others[:rest] + second + others[rest:]


def pytest_terminal_summary(terminalreporter):
    """How many cases the fuzz tests ran, and what became of them."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    for name, value in (item for report in reports if report.when == "call" for item in report.user_properties):
        if name == "fuzz":
            terminalreporter.write_line(f"fuzz: {value}")


def tiny():
    """A whole run of seconds; tests point `data` to what they need."""
    config = default()
    config.model.name = "vit_micro"
    config.model.patch_size = 8
    config.data.canvas_px = 32
    config.data.decode_threads = 2
    config.views.global_px = 16
    config.views.local_px = 8
    config.views.local_count = 0  # half of the time to trace and compile
    config.head.prototypes = 24
    config.head.hidden_dim = 16
    config.head.bottleneck_dim = 8
    config.method.mil_hidden_dim = 8
    config.train.batch_size = config.method.momentum_batch_size = 8
    config.train.epochs = 2.0
    config.train.log_every_steps = 1
    config.train.checkpoint_every_epochs = 1.0
    config.optim.warmup_epochs = 0.5
    config.eval.batch_size = 8
    config.eval.features = "mil"
    config.eval.protocols = config.eval.protocols_between = ("knn", "retrieval")  # the others compile programs of their own
    return config


@pytest.fixture
def tiny_config():
    return tiny()


@pytest.fixture(scope="session", autouse=True)
def quick_runs():
    """Runs in this process have programs that are compiled quickly, and once for all runs that share it.

    What tests compare of them are files, and numbers of one program with numbers of the same one. A run with all optimizations
    is in `tests/test_cli.py`; in `tests/faults` each process has a program of its own, and goes on bit for bit from another's.
    """
    from cmd_jax.config import flatten
    from cmd_jax.training.run import Run

    compile, first_state, programs = Run.compile, Run.first_state, {}

    def quickly(build, run):
        with pytest.MonkeyPatch.context() as patch:
            whole = jax.stages.Lowered.compile
            patch.setattr(jax.stages.Lowered, "compile", lambda lowered: whole(lowered, dict(QUICK)))
            return build(run)

    def compile_once(run):
        read = {name: value for name, value in flatten(run.config).items() if not BESIDE_THE_STEP.fullmatch(name)}
        key = repr(read), len(run.source), run.shardings.mesh
        if key not in programs:
            programs[key] = quickly(compile, run)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "compile", compile_once)
        patch.setattr(Run, "first_state", lambda run: quickly(first_state, run))
        yield


@pytest.fixture(scope="session")
def programs():
    """Commands in processes of their own, whose programs are compiled quickly, and whose warnings of changes are errors."""
    from tests.programs import FLAGS, Programs

    with Programs(flags=FLAGS, XLA_FLAGS=QUICK_FLAGS) as programs:
        yield programs


def made_once(tmp_path_factory, name, make):
    """A directory that the first of the test processes fills, with `make(path)`, and all read."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    path, done = root / name, root / f"{name}.done"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            make(path)
            done.touch()
    return path


def _write_photos(root):
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for label, name in enumerate(("a class", "b.class", "<script>")):
            os.makedirs(root / split / name)
            for number in range(count):
                base = np.array([40, 120, 200])[(np.arange(3) + label) % 3]
                pixels = np.clip(base + rng.normal(0, 40, (24, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory):
    """train/CLASS/* and test/CLASS/* with 3 classes of coloured noise: 8 + 4 images a class; tests only read it."""
    return made_once(tmp_path_factory, "photos", _write_photos)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, photo_folder):
    """(workdir, config) of an uninterrupted run of six steps, trained in one of the test processes; tests only read it."""
    from cmd_jax.train_and_evaluate import train_and_evaluate

    config = tiny()
    config.data.source, config.data.folder = "folder", str(photo_folder)
    trained = made_once(tmp_path_factory, "finished", lambda path: train_and_evaluate(config, str(path)))
    return shutil.copytree(trained, tmp_path_factory.mktemp("run"), dirs_exist_ok=True), config
