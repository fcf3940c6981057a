"""Progress on a terminal and elsewhere, and the files of numbers."""

import json

from cmd_jax.training import metrics
from cmd_jax.training.metrics import MetricsWriter, Progress

NUMBERS = {"loss": 1.5, "teacher_entropy": 0.4, "feature_std": 0.9}


class Clock:
    """A clock that the test sets."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


def _run(progress, clock, steps, seconds):
    for step in steps:
        clock.seconds += seconds
        progress.advance(step)


def test_speed_and_eta_exclude_the_compilation(capsys):
    clock = Clock()
    progress = Progress(first_step=10, steps=4000, batch_size=32, now=clock)
    progress.show(10, NUMBERS)
    _run(progress, clock, [11], 60.0)  # the first step compiles
    _run(progress, clock, range(12, 22), 2.0)
    progress.show(21, NUMBERS)
    first, last = capsys.readouterr().out.splitlines()
    assert first.endswith("0 images/s  ETA ?")
    assert last == "step 21/4000  loss 1.500  entropy 0.40  feature std 0.90  16 images/s  ETA 2:12:38"


def test_pauses_count_for_the_eta_alone(capsys):
    clock = Clock()
    progress = Progress(first_step=0, steps=110, batch_size=32, now=clock)
    with progress.paused():  # before the first step: it does not come again
        clock.seconds += 1000.0
    _run(progress, clock, range(1, 12), 2.0)
    for step in (11, 21):
        with progress.paused():
            clock.seconds += 30.0
        assert progress.images_per_s() == 16.0
        _run(progress, clock, range(step + 1, step + 11), 2.0)
    assert progress.images_per_s() == 16.0
    progress.show(30, NUMBERS)
    # 30 steps after the first and two pauses took 120 s
    assert capsys.readouterr().out.endswith("16 images/s  ETA 0:05:20\n")


def test_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(metrics.sys.stderr, "isatty", lambda: True, raising=False)
    clock = Clock()
    progress = Progress(first_step=0, steps=3, batch_size=4, now=clock)
    _run(progress, clock, (1, 2, 3), 1.0)
    progress.show(3, NUMBERS)
    progress.write_line("a line")
    progress.close()
    out = capsys.readouterr()
    assert "a line" in out.out
    assert "3/3" in out.err
    assert "4 images/s  ETA 0:00:00" in out.err


def test_resumed_writer_drops_later_lines(tmp_path):
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
