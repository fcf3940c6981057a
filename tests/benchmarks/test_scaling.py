"""The benchmarks of meshes and of slices: what they compute besides compiling, and --help; their make targets compile."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ahead, scaling, tpu_compile

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["scaling", "tpu_compile"])
def test_help_names_the_command(name):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"python -m benchmarks.{name}" in done.stdout


def test_settings_are_read_as_the_flags_of_a_run():
    config = ahead.configuration(["model.dtype=bfloat16", "train.accumulate=4", "mesh.shard_state=True"])
    assert (config.model.dtype, config.train.accumulate, config.mesh.shard_state) == ("bfloat16", 4, True)
    with pytest.raises(KeyError, match="accumulat"):
        ahead.configuration(["train.acumulate=4"])


def test_the_compilers_refusal_says_how_much_it_needs():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by"
    assert ahead.needed_memory(message) == 20.5 * 2**30
    assert ahead.needed_memory("INTERNAL: something else") is None


def test_cases_are_those_asked_for_and_a_misfit_fails():
    args = argparse.Namespace(models=["vit_small"], topologies=["v5e:2x4"], settings="train.accumulate=2 mesh.shard_state=True")
    (case,) = tpu_compile.cases(args)
    assert case.settings == ("train.accumulate=2", "mesh.shard_state=True")
    results = [{"meant_to_fit": True, "fits": True}, {"meant_to_fit": False, "fits": False}]
    assert tpu_compile.failures(results) == []
    assert len(tpu_compile.failures([*results, {"meant_to_fit": True, "fits": False}])) == 1


def test_every_generation_has_settings_that_are_meant_to_fit():
    for model in tpu_compile.MODELS:
        for topology in tpu_compile.TOPOLOGIES:
            assert tpu_compile.FITTING[model, topology.split(":")[0]]


def test_prediction_by_hand():
    all_reduce = {"op": "all-reduce", "bytes": 10**8, "group_size": 256, "executions": 1}
    row = {"flops": 197e10, "wire_bytes": 2e8, "collectives": [all_reduce]}
    predicted = scaling.predict(row, utilization=0.5)
    assert predicted["products_s"] == pytest.approx(0.02)  # 197e10 / 197e12 / 0.5
    # 2e8 bytes over two links of 50 GB/s, and 2 x 16 hops of 1 us; over four links
    assert predicted["sending_s"] == pytest.approx({"pessimistic": 0.002 + 32e-6, "optimistic": 0.001})
    assert predicted["efficiency"] == pytest.approx({"pessimistic": 0.02 / 0.022032, "optimistic": 1.0})


def test_meshes_are_read_by_name():
    assert scaling.chips_of("v5e:16x16") == 256
    assert scaling.chips_of("cpu:8") == 8
