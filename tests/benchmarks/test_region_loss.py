"""The region loss's benchmark at tiny sizes: the forms agree, and its last line has the ratios."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIZES = ["--width=8", "--features=8", "--global_patches=9", "--local_patches=4", "--local_count=2", "--rounds=1"]


def run(*options):
    command = [sys.executable, "-m", "benchmarks.region_loss", *SIZES, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_streamed_needs_less_memory_than_plain():
    summary = run("--objectives=region", "--prototypes=4096", "--chunk=64", "--torch_python=none")
    assert (summary["objective"], summary["prototypes"], summary["batch_size"]) == ("region", 4096, 1)
    assert summary["time_ratio"] is None  # of PyTorch
    assert summary["time_ratio_jax"] > 0
    assert 0 < summary["memory_ratio"] < 0.5
    assert summary["versions"].keys() == {"jax"}
    (case,) = summary["cases"]
    assert case["chunk"] == 64
    assert case["forms"]["streamed"]["loss"] == pytest.approx(case["forms"]["plain"]["loss"], rel=1e-5)
