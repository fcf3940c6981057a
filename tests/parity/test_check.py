"""Parity on the carried golden numbers and on Swins of other sizes; whatever is off, absent or unknown is not ok."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cmd_jax.errors import ConfigError
from tests.parity.check import CHECKERS, EXPECTED, check_fixture, fixture_names
from tests.parity.fixture import difference
from tests.parity.swin_oracle import write_fixture

FIXTURES = Path(__file__).parent.parent / "fixtures"
NAMES = sorted(path.stem for path in FIXTURES.glob("*.npz"))
SMALL_SWIN = {
    "img_size": 64,
    "patch_size": 4,
    "embed_dim": 6,
    "depths": [2, 1, 2],
    "num_heads": [1, 2, 3],
    "window_size": 5,
    "mlp_ratio": 2,
    "layernorm_eps": 1e-6,
}


def _arrays(name):
    with np.load(FIXTURES / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def _check(directory, name, arrays):
    np.savez(directory / f"{name}.npz", **arrays)
    return check_fixture(str(directory), name)


@pytest.mark.parametrize("name", NAMES)
def test_the_project_gives_the_golden_numbers(name):
    outcome = check_fixture(str(FIXTURES), name)
    assert (outcome.status, outcome.notes) == ("ok", ())
    assert outcome.line().split()[0::3] == [name, "ok"]
    error, limit = (float(word) for word in outcome.line().split()[1:3])
    assert error <= limit


def test_all_fixtures_but_the_two_swins_are_carried():
    assert set(NAMES) == set(EXPECTED) - {"swin_w7", "swin_w14"}
    assert sum(path.stat().st_size for path in FIXTURES.iterdir()) < 12e6


@pytest.mark.parametrize(
    ("name", "changes", "sizes", "last_blocks"),
    [
        # windows of 5 on maps of 16, 8, 4: shifted, padded, clamped; an odd size; multi-crop with both heads
        (
            "swin_w5",
            {
                "mc": {"batch": 2, "n_local": 3, "global_px": 64, "local_px": 28},
                "head": {"nlayers": 2, "hidden_dim": 10, "bottleneck_dim": 5, "out_dim": 13},
            },
            {"52": 52, "64": 64},
            4,
        ),
        # the second stage's side is the window: no shift; inputs smaller than one window
        ("swin_w8", {"window_size": 8, "depths": [2, 2]} | {"num_heads": [2, 1]}, {"20": 20}, 3),
    ],
)
def test_swins_of_other_sizes_equal_the_float64_oracle(tmp_path, name, changes, sizes, last_blocks):
    write_fixture(tmp_path, name, SMALL_SWIN | changes, sizes, last_blocks)
    outcome = check_fixture(str(tmp_path), name)
    assert (outcome.status, outcome.notes) == ("ok", ())
    with np.load(tmp_path / f"{name}.npz") as file:
        assert {c.array for c in outcome.comparisons} == {key for key in file.files if key.startswith("out_")}


@pytest.mark.parametrize(
    ("name", "array", "change"),
    [
        ("schedules", "out_b_lr", 1e-8),
        ("knn", "out_knn10_top1", 0.01),
        ("knn", "out_retrieval_ratio", 0.02),
        ("knn", "out_retrieval_origin_sizes", 1),
        ("dino_loss", "out_seq_center1", 1e-5),
        ("optimizer", "out_train_g_step4_teacher__norm.bias", 1e-5),
    ],
)
def test_a_perturbed_array_fails(tmp_path, name, array, change):
    arrays = _arrays(name)
    flat = arrays[array].reshape(-1).copy()
    flat[-1] += flat.dtype.type(change)
    arrays[array] = flat.reshape(arrays[array].shape)
    outcome = _check(tmp_path, name, arrays)
    assert outcome.status == "FAIL"
    assert len(outcome.notes) == 1
    assert outcome.notes[0].startswith(f"{array} is off by")
    assert outcome.line().split()[-1] == "FAIL"


def test_absent_arrays_parameters_and_files_are_missing(tmp_path):
    arrays = _arrays("schedules")
    without = {key: value for key, value in arrays.items() if key != "out_a_wd"}
    outcome = _check(tmp_path, "schedules", without)
    assert (outcome.status, outcome.notes) == ("MISSING", ("out_a_wd is missing",))
    meta = json.loads(str(arrays["meta_json"]))
    del meta["cases"]["a"]["min_lr"]
    outcome = _check(tmp_path, "schedules", arrays | {"meta_json": np.array(json.dumps(meta))})
    assert (outcome.status, outcome.notes) == ("MISSING", ("meta_json: min_lr is missing",))
    shutil.copy(FIXTURES / "dino_head.npz", tmp_path)
    outcome = check_fixture(str(tmp_path), "dino_head")
    assert (outcome.status, outcome.notes) == ("MISSING", ("dino_head_weights.safetensors is missing",))
    assert check_fixture(str(tmp_path), "optimizer").status == "MISSING"
    assert outcome.line().split() == ["dino_head", "-", "-", "MISSING"]


def test_what_is_unknown_unread_misshapen_or_damaged_fails(tmp_path):
    arrays = _arrays("schedules")
    outcome = _check(tmp_path, "mystery", arrays)
    assert (outcome.status, "no checker has this name" in outcome.notes[0]) == ("FAIL", True)
    outcome = _check(tmp_path, "schedules", arrays | {"out_a_extra": np.zeros(1)})
    assert (outcome.status, outcome.notes) == ("FAIL", ("out_a_extra was compared with nothing",))
    outcome = _check(tmp_path, "schedules", arrays | {"out_a_lr": arrays["out_a_lr"][:-1]})
    assert (outcome.status, outcome.notes) == ("FAIL", ("out_a_lr is off by inf, absolute",))
    poisoned = arrays["out_a_lr"].copy()
    poisoned[3] = np.nan
    assert _check(tmp_path, "schedules", arrays | {"out_a_lr": poisoned}).status == "FAIL"
    knn = _arrays("knn")
    outcome = _check(tmp_path, "knn", knn | {"in_test_feats": knn["in_test_feats"][:, :-1]})
    assert outcome.status == "FAIL"
    assert "stopped: TypeError: dot_general" in outcome.notes[0]
    (tmp_path / "optimizer.npz").write_bytes(b"PK damaged")
    assert check_fixture(str(tmp_path), "optimizer").status == "FAIL"


def test_the_manifest_or_all_fixtures_are_expected(tmp_path):
    assert fixture_names(str(FIXTURES)) == NAMES
    (tmp_path / "mystery.npz").touch()
    (tmp_path / "swin_w9_weights.safetensors").touch()
    assert fixture_names(str(tmp_path)) == sorted({*EXPECTED, "mystery", "swin_w9"})
    (tmp_path / "MANIFEST.md").write_text("| `knn.npz` | neighbours |")
    assert fixture_names(str(tmp_path)) == ["knn", "mystery", "swin_w9"]
    with pytest.raises(ConfigError, match="is not a directory"):
        fixture_names(str(tmp_path / "none"))
    assert all(any(name == key or name.startswith(f"{key}_") for key in CHECKERS) for name in EXPECTED)


def test_errors_are_measured_as_stated():
    expected = np.array([1.0, -4.0], np.float32)
    actual = expected + np.array([0.1, 0.2], np.float32)
    assert difference(actual, expected, "absolute") == pytest.approx(0.2)
    assert difference(actual, expected, "relative") == pytest.approx(0.1)
    assert difference(actual, expected, "of largest") == pytest.approx(0.05)
    assert difference(actual[:1], expected, "absolute") == np.inf
    nan = np.array([np.nan, 1.0])
    assert difference(nan, nan.copy(), "absolute") == 0
    assert difference(np.array([0.0, 1.0]), nan, "absolute") == np.inf
    assert difference(np.array([-np.inf]), np.array([np.inf]), "absolute") == np.inf
    assert difference(np.ones(1), np.zeros(1), "of largest") == np.inf
