"""Faults 2, 3 and 9: asked to stop in one process and in two, which save the same step and go on from it together."""

import signal

from tests.faults.runs import final_state, is_evaluating, last_step
from tests.runs import free_port, lines

EPOCHS = 8
STEPS = 3 * EPOCHS


def _start_two(start, workdir):
    port = free_port()
    cluster = ("--distributed", f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2", "--heartbeat_s=30")
    return [start(workdir, EPOCHS, *cluster, f"--process_id={index}") for index in range(2)]


def _end(runs):
    codes = [run.end() for run in runs]
    return codes, "\n".join(run.output() for run in runs)


def test_two_processes_stop_and_resume_at_one_step(start, tmp_path):
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    codes, output = _end(_start_two(start, reference))
    assert codes == [0, 0], output

    # one of them is told, at a step and inside an evaluation
    for told, moment in ((1, lambda: last_step(workdir) > 3), (0, lambda: is_evaluating(workdir))):
        seen = final_state(workdir)[0] if told == 0 else 0
        runs = _start_two(start, workdir)
        assert runs[0].wait_for(lambda seen=seen: last_step(workdir) > seen), runs[0].output()
        assert runs[0].wait_for(moment, every_s=0.002), runs[0].output()
        runs[told].send(signal.SIGTERM)
        codes, output = _end(runs)
        assert codes == [75, 75], output
        messages = [line for line in output.splitlines() if line.startswith("preempted: ")]
        assert len(messages) == 2, output
        assert len(set(messages)) == 1, messages
        assert f"stopped as asked at step {final_state(workdir)[0]} of {STEPS}" in messages[0]

    # both pass over a step that is damaged on disk
    step = final_state(workdir)[0]
    for path in (workdir / "checkpoints" / str(step) / "train").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            data = path.read_bytes()
            path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
    codes, output = _end(_start_two(start, workdir))
    assert codes == [0, 0], output
    assert output.count(f"checkpoints/{step} is damaged") == 2, output
    assert final_state(workdir) == final_state(reference)
    assert [line["step"] for line in lines(workdir) if "loss" in line] == list(range(1, STEPS + 1))


def test_second_ctrl_c_ends_at_once(start, tmp_path):
    workdir = tmp_path / "run"
    run = start(workdir, EPOCHS)
    assert run.wait_for(lambda: last_step(workdir) > 1), run.output()
    run.send(signal.SIGINT)
    assert run.end() == 75, run.output()
    step = final_state(workdir)[0]
    assert f"stopped as asked at step {step} of {STEPS}" in run.output()
    run = start(workdir, EPOCHS)
    assert run.wait_for(lambda: "cache:" in run.output()), run.output()  # the step is traced and compiled now
    run.send(signal.SIGTERM)
    assert run.wait_for(lambda: "asked to stop" in run.output()), run.output()
    run.send(signal.SIGTERM)
    assert run.end() in (-signal.SIGTERM, 75), run.output()  # 75: the program came from the cache faster than the signal
    assert final_state(workdir)[0] >= step
