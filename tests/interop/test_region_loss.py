"""The region loss's benchmark beside PyTorch at tiny sizes: three forms, one loss."""

import sys

import pytest

from tests.benchmarks.test_region_loss import run


def test_all_forms_are_measured_and_agree():
    summary = run("--objectives", "region", "cmd", "--prototypes=256", f"--torch_python={sys.executable}")
    assert min(summary[name] for name in ("time_ratio", "time_ratio_jax", "memory_ratio", "memory_ratio_torch")) > 0
    assert summary["versions"].keys() == {"jax", "torch"}
    assert [case["objective"] for case in summary["cases"]] == ["region", "cmd"]
    for case in summary["cases"]:
        losses = [case["forms"][form]["loss"] for form in ("streamed", "plain", "torch")]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
