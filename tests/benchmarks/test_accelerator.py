"""The accelerator battery, whole at toy sizes on the CPU, and what it does when a part fails."""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import accelerator, kernels
from benchmarks.accelerator_parts import PARTS, Part
from benchmarks.kernels import Event


@pytest.mark.long
def test_every_part_gives_figures_on_a_cpu(programs, tmp_path):
    """A second call keeps them."""
    arguments = ("benchmarks.accelerator", "--minutes=60", f"--out={tmp_path}")
    first, second = (programs.run(*arguments) for _ in range(2))
    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert first.returncode == second.returncode == 0, first.stderr + logs
    result, again = (json.loads(done.stdout.splitlines()[-1]) for done in (first, second))
    assert result["left_out"] == []
    assert result["parts"] == again["parts"]
    assert list(result["parts"]) == [part.name for part in PARTS]
    for part, cases in result["parts"].items():
        assert cases, part
        for name, figures in cases.items():
            assert not {"error", "out_of_time_s"} & figures.keys(), (name, figures, logs)
    of_step = result["parts"]["steps"]["cmd"]
    assert of_step["images_per_s"] == pytest.approx(1e3 * of_step["images"] / of_step["step_ms"])
    fastest = result["parts"]["ceiling"]["bfloat16, 64"]["tflop_per_s"]
    assert of_step["utilization"] == pytest.approx(of_step["model_tflop_per_s"] / fastest)
    assert result["parts"]["agreement"]["tests: objective"]["passed"] == 1
    assert result["parts"]["quality"]["folder"]["left_out"] == "no --folder=PHOTOS"
    assert "kept from an earlier call" in second.stdout
    profile = result["parts"]["profile"]["cmd"]
    assert all("train_step" in kernel["source"] for kernel in profile["kernels"][:3])
    table = (tmp_path / "table.md").read_text()
    assert table.count("\n| ") == sum(map(len, result["parts"].values())) + len(profile["kernels"]) + 1


def _fail():
    raise MemoryError("RESOURCE_EXHAUSTED: too large")


ACTIONS = {"fail": _fail, "die": lambda: os.kill(os.getpid(), signal.SIGKILL), "sleep": lambda: time.sleep(60)}


def main():
    """OUT SECONDS CASE=ACTION ...: runs a part; an action that is a number is what the case finds."""
    out, limit_s, *given = sys.argv[1:]
    pairs = dict(case.split("=") for case in given)
    cases = {name: ACTIONS.get(action, lambda action=action: {"x": int(action)}) for name, action in pairs.items()}
    accelerator.run_part(Part("part", 1, lambda *_: cases), cases, argparse.Namespace(out=Path(out)), float(limit_s))


def run_part(programs, out, limit_s, **actions):
    """In a process without a device's threads, as the command has it when it forks."""
    cases = [f"{name}={action}" for name, action in actions.items()]
    done = programs.run("tests.benchmarks.test_accelerator", out, limit_s, *cases)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "part.json").read_text())["cases"]


def test_a_case_that_fails_costs_itself(programs, tmp_path):
    found = run_part(programs, tmp_path, 60, bad="fail", dead="die", good=1)
    assert found["bad"]["error"] == "MemoryError: RESOURCE_EXHAUSTED: too large"
    assert found["dead"] == {"error": "its process ended with code -9; see part.log"}
    assert found["good"]["x"] == 1


def test_a_part_out_of_time_is_stopped_and_continued(programs, tmp_path):
    found = run_part(programs, tmp_path, 2, first=1, slow="sleep", last=3)
    assert found["first"]["x"] == 1
    assert found["slow"] == {"out_of_time_s": 2}
    assert "last" not in found
    kept = found["first"]
    found = run_part(programs, tmp_path, 60, first=9, slow=2, last=3)
    assert found["first"] == kept
    assert list(found) == ["first", "slow", "last"]
    assert (found["slow"]["x"], found["last"]["x"]) == (2, 3)


def test_kernels_count_without_what_runs_inside():
    body = [Event("body", "dot.1", 10, 30), Event("body", "dot.2", 50, 20)]
    queues = [[*body, Event("while", "while", 0, 100), Event("add", "add", 100, 50)], [Event("add", "add", 0, 50)]]
    found = {kernel.name: kernel for kernel in kernels.kernels(queues, {"dot.1": "jit(step)/dot"})}
    assert list(found) == ["add", "while", "body"]
    assert [(kernel.ms * 1e6, kernel.count) for kernel in found.values()] == [(100, 2), (50, 1), (50, 2)]
    assert found["add"].share == 0.5
    assert (found["body"].source, found["add"].source) == ("jit(step)/dot", "")


def test_streams_of_a_device_come_before_threads():
    event = lambda name, **stats: SimpleNamespace(name=name, start_ns=0, duration_ns=5, stats=stats.items())
    line = lambda name, *events: SimpleNamespace(name=name, events=events)
    plane = lambda name, *lines: SimpleNamespace(name=name, lines=lines)
    host = plane("/host:CPU", line("thread", event("dot.1", hlo_op="dot.1"), event("python")))
    gpu = plane("/device:GPU:0", line("Stream #1", event("gemm", hlo_op="dot.1"), event("memcpy")), line("Steps", event("1")))
    tpu = plane("/device:TPU:0", line("XLA Modules", event("step")), line("XLA Ops", event("%fusion.3 = bf16[8] fusion(%x)")))
    names = lambda *planes: [[event[:2] for event in of] for of in kernels.lines(SimpleNamespace(planes=planes))]
    assert names(host) == [[("dot.1", "dot.1")]]
    assert names(host, gpu) == [[("gemm", "dot.1"), ("memcpy", "memcpy")]]
    assert names(host, tpu) == [[("fusion.3", "fusion.3")]]


if __name__ == "__main__":
    main()
