"""Progress on a terminal and elsewhere, and the files of numbers."""

import json
import resource
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

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


def _events(directory):
    """The events of a directory's only file; a record is length, checksum, content, checksum."""
    (path,) = directory.iterdir()
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack_from("<Q", content)
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    writer = MetricsWriter(str(tmp_path), 2)
    writer.write(3, {"loss": 2.5, "eval_rank1": 0.25, "grad_norm": float("nan")})
    writer.write(4, {"loss": 1.5})
    writer.close()
    version, start, *steps = _events(tmp_path / "tb")
    assert version.file_version == "brain.Event:2"
    # TensorBoard hides what an interrupted run wrote of this step and of later ones.
    assert (start.step, start.session_log.status) == (3, SessionLog.START)
    numbers = [(event.step, {value.tag: value.simple_value for value in event.summary.value}) for event in steps]
    assert numbers == [(3, {"loss": 2.5, "eval_rank1": 0.25}), (4, {"loss": 1.5})]


def test_full_disk_under_tensorboard_is_an_error(tmp_path):
    """Not a thread that ends and is waited for."""
    writer = MetricsWriter(str(tmp_path), 0)
    lines = ((step, {"loss": 1.0}) for step in range(1000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, limits[1]))  # a write past it fails as one to a full disk does
        with pytest.raises(OSError, match="File too large"):
            all(writer.write(*line) is None for line in lines)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (events,) = (tmp_path / "tb").iterdir()
    assert (tmp_path / "metrics.jsonl").stat().st_size < events.stat().st_size == 2**14
    writer.close()
