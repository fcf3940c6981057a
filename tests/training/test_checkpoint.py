"""Checkpoints: what is stored comes back bit for bit, and what is damaged is noticed, moved aside and never taken."""

import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmd_jax.config import default
from cmd_jax.errors import CheckpointError, SaveError
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.fingerprint import fingerprints
from cmd_jax.training.state import TrainState

ROOT = Path(__file__).parents[2]
# Of several reads at once that fail, Orbax waits for the first alone; the others call back into a loop that is closed.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
DTYPES = (np.float32, np.int32, np.uint32, np.float16, jnp.bfloat16, np.int8, np.uint8, np.bool_)


def _oracle(x):
    """The sum of fingerprint.py as a loop."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    total = 0
    for i, bits in enumerate(np.ascontiguousarray(x).reshape(-1).view(unsigned)):
        total += int(bits) * (2 * i + 1)
    return f"{total % 2**32:08x}"


def _random(shape, dtype, seed=0):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    data = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    return (data & 1).view(np.bool_).reshape(shape) if dtype is np.bool_ else data.view(dtype).reshape(shape)


def test_fingerprints_equal_the_stated_sum():
    arrays = {f"{np.dtype(dtype)}{shape}": _random(shape, dtype) for dtype in DTYPES for shape in ((), (1,), (7,), (3, 4, 5))}
    assert fingerprints({"a": arrays}) == {f"a/{name}": _oracle(x) for name, x in arrays.items()}
    with jax.enable_x64(True), pytest.raises(TypeError, match="float64 has no fingerprint"):
        fingerprints({"a": np.zeros(3)})


@settings(deadline=None)
@given(st.sampled_from([(1,), (3, 4, 5)]), st.sampled_from(DTYPES[:-1]), st.integers(0, 2**31), st.data())
def test_any_flipped_bit_changes_the_fingerprint(shape, dtype, seed, data):
    x = _random(shape, dtype, seed)
    flat = bytearray(x.tobytes())
    bit = data.draw(st.integers(0, 8 * len(flat) - 1))
    flat[bit // 8] ^= 1 << bit % 8
    changed = np.frombuffer(bytes(flat), x.dtype).reshape(shape)
    assert fingerprints({"x": changed}) != fingerprints({"x": x})


def _state(step, seed=0):
    rng = np.random.default_rng([step, seed])
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    network = lambda: {"backbone": {"kernel": draw(32, 8), "bias": draw(8)}, "head": {"prototypes": draw(16, 8)}}
    student, teacher = network(), network()
    optimizer = ({"count": jnp.int32(step), "mu": draw(32, 8)},)
    return TrainState(jnp.int32(step), student, teacher, optimizer, {"image": draw(16)}, jnp.int32(0))


def _abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _equal(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def _write(workdir, *steps, **options):
    checkpoints = Checkpoints(str(workdir), **options)
    for step in steps:
        checkpoints.save(_state(step), default())
    checkpoints.close()


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    _write(directory, 2, 4, 6)
    return directory


@pytest.fixture
def workdir(three_steps, tmp_path):
    """A copy of a run with steps 2, 4 and 6."""
    shutil.copytree(three_steps, tmp_path / "run")
    gc.freeze()  # what was there before the test is not looked at again, which would take seconds
    yield tmp_path / "run"
    gc.collect()  # reads that were given up are noticed here, where they are expected
    gc.unfreeze()


def _damage(workdir, step, item="teacher"):
    """Changes a byte in the middle of every file of an item that holds values, be it numbers or JSON."""
    files = [path for path in (workdir / "checkpoints" / str(step) / item).rglob("*") if path.is_file()]
    for path in [path for path in files if path.parent.name == "d" or path.name == "metadata"]:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)


def _names(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def test_restored_state_equals_the_saved_one(workdir):
    checkpoints, state = Checkpoints(str(workdir), read_only=True), _state(6)
    assert checkpoints.steps() == [2, 4, 6]
    assert _equal(checkpoints.restore_state(_abstract(state)), state)
    assert _equal(checkpoints.restore_state(_abstract(state), 2), _state(2))
    for network in ("teacher", "student"):
        step, params = checkpoints.read_network(network, 4)
        assert step == 4
        assert _equal(params, getattr(_state(4), network))


def test_relative_and_empty_workdirs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Checkpoints("run").resume(_abstract(_state(0))) is None
    _write("run", 3)
    assert _equal(Checkpoints("run").resume(_abstract(_state(3))), _state(3))


@pytest.mark.parametrize("item", ["teacher", "train", "meta"])
def test_damaged_step_is_moved_aside(item, workdir, caplog):
    _damage(workdir, 6, item)
    before = _names(workdir)
    reader = Checkpoints(str(workdir), read_only=True)
    assert _equal(reader.restore_state(_abstract(_state(4))), _state(4))
    assert _names(workdir) == before  # evaluation looks, and leaves it to the training
    checkpoints = Checkpoints(str(workdir))
    caplog.clear()
    assert _equal(checkpoints.resume(_abstract(_state(4))), _state(4))
    # "asyncio" tells when Orbax's other reads of the step have failed too.
    (error,) = [record for record in caplog.records if record.levelname == "ERROR" and record.name == "absl"]
    assert f"{workdir}/checkpoints/6 is damaged" in error.getMessage()
    assert checkpoints.steps() == [2, 4]
    (aside,) = set(_names(workdir)) - set(before)
    assert aside.startswith("6.damaged-")
    checkpoints.save(_state(6), default())
    checkpoints.close()
    assert _equal(Checkpoints(str(workdir)).resume(_abstract(_state(6))), _state(6))


def test_single_networks_are_verified_too(workdir):
    _damage(workdir, 6, "teacher")
    _damage(workdir, 4, "train")
    checkpoints = Checkpoints(str(workdir), read_only=True)
    assert checkpoints.read_network("teacher")[0] == 4
    assert checkpoints.read_network("student")[0] == 6
    assert checkpoints.restore_teacher(_abstract(_state(4).teacher))[0] == 4


def test_requested_step_that_is_damaged(workdir):
    _damage(workdir, 4)
    for read_only in (True, False):
        checkpoints = Checkpoints(str(workdir), read_only=read_only)
        with pytest.raises(CheckpointError, match=r"is damaged \(step 4: .*choose another step: \[2, 6\]"):
            checkpoints.restore_teacher(_abstract(_state(4).teacher), 4)
    assert "4" in _names(workdir)


def test_only_damaged_steps_never_start_afresh(workdir):
    for step in (2, 4, 6):
        _damage(workdir, step)
    before = _names(workdir)
    for _ in range(2):  # what may be a fault of the machine is left in its place
        with pytest.raises(CheckpointError, match=r"none of the steps 6, 4, 2 can be read .* refusing to start from scratch"):
            Checkpoints(str(workdir)).resume(_abstract(_state(0)))
    assert _names(workdir) == before
    for step in (2, 4, 6):
        (workdir / "checkpoints" / str(step)).rename(workdir / "checkpoints" / f"{step}.damaged-1")
    with pytest.raises(CheckpointError, match=r"nothing but damaged steps .* refusing to start from scratch"):
        Checkpoints(str(workdir)).resume(_abstract(_state(0)))


def test_other_model_is_refused_without_quarantine(workdir):
    state = _state(6)
    other = state._replace(teacher=state.teacher | {"head": {"prototypes": jnp.zeros((16, 8), jnp.bfloat16)}})
    checkpoints = Checkpoints(str(workdir))
    with pytest.raises(CheckpointError, match="1 arrays differ, first head/prototypes: model bfloat16, checkpoint float32"):
        checkpoints.resume(_abstract(other))
    wide = state._replace(student=jax.tree.map(lambda x: jnp.zeros((2, *x.shape)), state.student))
    with pytest.raises(CheckpointError, match=r"3 arrays differ.*student/backbone/bias: model \(2, 8\), checkpoint \(8,\)"):
        checkpoints.resume(_abstract(wide))
    assert checkpoints.steps() == [2, 4, 6]


def test_changed_metadata_is_damage(workdir):
    """Orbax's own of the arrays, and ours."""
    path = workdir / "checkpoints" / "6" / "teacher" / "_METADATA"
    text = path.read_text()
    assert "kernel" in text
    path.write_text(text.replace("kernel", "kernal"))
    path = workdir / "checkpoints" / "4" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["config"]["seed"] += 1
    path.write_text(json.dumps(meta))
    assert int(Checkpoints(str(workdir)).resume(_abstract(_state(2))).step) == 2


def test_incomplete_steps_are_passed_over(workdir):
    directory = workdir / "checkpoints"
    shutil.copytree(directory / "6", directory / "8")
    os.remove(directory / "8" / "commit_success.txt")
    (directory / "7").mkdir()
    shutil.copytree(directory / "4", directory / ".trash" / "1")
    reader = Checkpoints(str(workdir), read_only=True)
    assert reader.steps() == [2, 4, 6]
    assert {"7", "8", ".trash"} < set(_names(workdir))
    shutil.rmtree(directory / "6" / "train")
    assert reader.restore_teacher(_abstract(_state(6).teacher))[0] == 6  # it reads nothing else
    assert int(reader.restore_state(_abstract(_state(4))).step) == 4
    checkpoints = Checkpoints(str(workdir))
    assert int(checkpoints.resume(_abstract(_state(4))).step) == 4
    assert ".trash" not in _names(workdir)
    for step in (6, 7, 8):
        checkpoints.save(_state(step), default())
    checkpoints.close()
    assert [name for name in _names(workdir) if ".damaged-" not in name] == ["6", "7", "8"]


def test_newest_and_best_steps_are_kept(tmp_path):
    values = {1: 2.0, 2: 0.1, 3: 1.0, 4: float("nan"), 5: 3.0, 6: 1.5}  # less loss is better
    abstract = _abstract(_state(1).teacher)
    for steps in ([1, 2, 3], [4, 5, 6]):  # a run of two processes, one after the other
        checkpoints = Checkpoints(str(tmp_path), keep=2, best_metric="loss")
        for step in steps:
            checkpoints.save(_state(step), default(), values[step])
        checkpoints.close()
    assert _names(tmp_path) == ["2", "5", "6"]  # and nothing is left in the trash
    reader = Checkpoints(str(tmp_path), best_metric="loss", read_only=True)
    assert reader.restore_teacher(abstract, best=True)[0] == 2
    assert reader.restore_teacher(abstract)[0] == reader.result_step() == 2
    _damage(tmp_path, 2)
    assert reader.restore_teacher(abstract)[0] == 6  # the next best: 1.5
    other = Checkpoints(str(tmp_path), best_metric="feature_std", read_only=True)
    assert other.best_step() is None
    with pytest.raises(CheckpointError, match=r"no step has a value of train\.best_metric"):
        other.restore_teacher(abstract, best=True)


def test_failed_save_leaves_other_steps_intact(workdir):
    checkpoints = Checkpoints(str(workdir))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = _state(8)._replace(centers={"image": jnp.asarray(np.random.default_rng(0).normal(size=2**18), jnp.float32)})

    def save_and_train_on():
        checkpoints.save(big, default())
        while checkpoints._saving is not None:
            checkpoints.check()

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, limits[1]))  # a write past it fails as one to a full disk does
        expected = r"points/8 could not be written .* MiB are free there(, for [\d,]+ more files)?; whole steps: \[2, 4, 6\]"
        with pytest.raises(SaveError, match=expected):
            save_and_train_on()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    reader = Checkpoints(str(workdir), read_only=True)
    assert reader.steps() == [2, 4, 6]
    assert _equal(reader.restore_state(_abstract(_state(6))), _state(6))


def test_step_that_cannot_be_begun_leaves_no_thread(workdir):
    """Orbax's writers must not wait for a directory that nobody makes: the process would end after minutes."""
    checkpoints = Checkpoints(str(workdir))
    (workdir / "checkpoints" / "8").symlink_to(workdir / "nowhere" / "8")
    before = threading.enumerate()
    with pytest.raises(SaveError, match="points/8 could not be written"):
        checkpoints.save(_state(8), default())
    assert [thread for thread in threading.enumerate() if thread not in before and not thread.daemon] == []
    checkpoints.close()


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from cmd_jax.config import default
from cmd_jax.training import fingerprint
from cmd_jax.training.checkpoint import Checkpoints

assert jax.device_count() == 8
x = np.random.default_rng(0).normal(size=(64, 24)).astype(np.float32)
mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
specs = (P(), P("a"), P(None, "b"), P("b", "a"), P(("a", "b")))
trees = [{"x": jax.device_put(x, NamedSharding(mesh, spec))} for spec in specs]
print(*(fingerprint.fingerprints(tree)["x"] for tree in trees))
print(max(fingerprint._sums.lower(tree).compile().as_text().count("all-gather") for tree in trees))
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save_teacher(trees[3], default())
checkpoints.close()
"""


def test_eight_devices_and_one_agree(tmp_path):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, str(tmp_path)]
    out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    x = np.random.default_rng(0).normal(size=(64, 24)).astype(np.float32)
    sums, gathers = out.stdout.splitlines()
    assert set(sums.split()) == {_oracle(x)}
    assert len(sums.split()) == 5
    assert gathers == "0"
    checkpoints = Checkpoints(str(tmp_path), read_only=True)
    teacher = checkpoints.restore_teacher(_abstract({"x": jnp.zeros((64, 24))}))[1]
    np.testing.assert_array_equal(teacher["x"], x)
    np.testing.assert_array_equal(checkpoints.read_network("teacher")[1]["x"], x)
