"""The region loss's benchmark beside PyTorch at tiny sizes: three forms, one loss."""

import json
import sys

import pytest

from tests.benchmarks.test_region_loss import run


def test_all_forms_are_measured_and_agree():
    done = run("--objectives", "region", "cmd", "--prototypes=256", "--budget_gib=0", f"--torch_python={sys.executable}")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert min(summary[name] for name in ("time_ratio", "time_ratio_jax", "memory_ratio", "memory_ratio_torch")) > 0
    assert summary["versions"].keys() == {"jax", "torch"}
    assert (summary["objective"], summary["prototypes"]) == ("region", 256)
    assert [case["objective"] for case in summary["cases"]] == ["region", "cmd"]
    for case in summary["cases"]:
        losses = [case["forms"][form]["loss"] for form in ("streamed", "naive", "torch")]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
