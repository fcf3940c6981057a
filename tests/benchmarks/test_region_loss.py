"""The region loss's benchmark at tiny sizes, without PyTorch: its table and the keys of its last line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIZES = ["--width=8", "--features=8", "--global_patches=9", "--local_patches=4", "--local_count=2", "--rounds=1"]


def run(*options):
    command = [sys.executable, "-m", "benchmarks.region_loss", *SIZES, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_streamed_needs_less_memory_than_naive_and_the_last_line_tells():
    done = run("--objectives=region", "--prototypes=4096", "--chunk=64", "--torch_python=none")
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert "time_ratio are left out" in table[0]
    assert len(table) == 2 + 2
    summary = json.loads(last)
    assert (summary["objective"], summary["prototypes"], summary["batch_size"]) == ("region", 4096, 1)
    assert summary["time_ratio"] is None  # of PyTorch
    assert summary["time_ratio_jax"] > 0
    assert summary["memory_ratio"] < 0.5
    assert summary["versions"].keys() == {"jax"}
    assert summary["device"]
    for case in summary["cases"]:
        streamed, naive = case["forms"]["streamed"], case["forms"]["naive"]
        assert case["chunk"] == 64
        assert 0 < streamed["temporary_bytes"] < naive["temporary_bytes"]
        assert streamed["largest_batch"] > naive["largest_batch"] > 0
        assert streamed["cpu_s_min"] <= streamed["cpu_s"] <= streamed["cpu_s_max"]
        assert streamed["loss"] == pytest.approx(naive["loss"], rel=1e-5)


def test_a_python_without_torch_is_refused():
    done = run("--torch_python=false")
    assert done.returncode == 1
    assert "--torch_python=false cannot import torch" in done.stderr
