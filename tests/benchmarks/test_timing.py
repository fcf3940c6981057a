"""Processes that are timed in turn."""

import sys

import pytest

from benchmarks.timing import Worker, alternate, set_values
from tests.conftest import tiny

SERVE = (
    "import os, time; from benchmarks import timing; replies = timing.claim_stdout(); os.write(1, b'low'); print('high'); "
    "timing.serve(lambda: (print('step'), time.sleep({seconds})), {info}, replies)"
)


def program(seconds, info):
    return [sys.executable, "-c", SERVE.format(seconds=seconds, info=info)], {}


def test_sides_take_turns_and_report_seconds():
    timed = alternate({"fast": program(0, {"a": 1}), "slow": program(0.02, {})}, rounds=3)
    assert timed["fast"].info == {"a": 1}
    assert len(timed["fast"].seconds("wall_s")) == len(timed["slow"].seconds("cpu_s")) == 3
    assert min(timed["slow"].seconds("wall_s")) > 0
    assert timed["slow"].peak_bytes() > 2**20


def test_a_dead_side_reports_its_error():
    with pytest.raises(RuntimeError, match=r"(?s)ended with code 1; .*no such case"):
        Worker([sys.executable, "-c", "import sys; sys.exit('no such case')"])
    dying = "import sys; from benchmarks import timing; timing.serve(lambda: sys.exit('broken'), {}, timing.claim_stdout())"
    worker = Worker([sys.executable, "-c", dying])
    with pytest.raises(RuntimeError, match=r"(?s)code 1; .*broken"):
        worker.run(1)


def test_settings_are_those_of_a_run():
    config = tiny()
    set_values(config, ["model.dtype=bfloat16", "train.accumulate=4", "mesh.shard_state=True"])
    assert (config.model.dtype, config.train.accumulate, config.mesh.shard_state) == ("bfloat16", 4, True)
    with pytest.raises(KeyError, match=r"train\.acumulate"):
        set_values(config, ["train.acumulate=4"])
