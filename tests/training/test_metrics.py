"""Progress on a terminal and elsewhere, and the files of numbers."""

import json

import pytest

from cmd_jax.training import metrics
from cmd_jax.training.metrics import MetricsWriter, Progress

NUMBERS = {"loss": 1.5, "teacher_entropy": 0.4, "feature_std": 0.9}


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_give_speed_and_remaining_time_without_the_compilation(clock, capsys):
    progress = Progress(first_step=10, steps=4000, batch_size=32)
    progress.show(10, NUMBERS)
    clock[0] += 60.0  # the first step compiles
    progress.advance(11)
    for step in range(12, 22):
        clock[0] += 2.0
        progress.advance(step)
    progress.show(21, NUMBERS)
    first, last = capsys.readouterr().out.splitlines()
    assert first.endswith("ETA ?")
    assert last == "step 21/4000  loss 1.500  entropy 0.40  feature std 0.90  16 images/s  ETA 2:12:38"


def test_a_terminal_gets_a_bar(clock, capsys, monkeypatch):
    monkeypatch.setattr(metrics.sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(first_step=0, steps=3, batch_size=4)
    for step in (1, 2, 3):
        clock[0] += 1.0
        progress.advance(step)
    progress.show(3, NUMBERS)
    progress.say("a line")
    progress.close()
    out = capsys.readouterr()
    assert "a line" in out.out
    assert "3/3" in out.err
    assert "4 images/s" in out.err


def test_lines_after_the_step_that_is_continued_are_dropped(tmp_path):
    writer = MetricsWriter(str(tmp_path), 0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')  # a kill cut the line off
    writer = MetricsWriter(str(tmp_path), 2)
    writer.write(3, {"loss": 9.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 9.0}]
    MetricsWriter(str(tmp_path), 0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
