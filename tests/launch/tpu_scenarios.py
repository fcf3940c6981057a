"""What tpu_vm.sh must do; each scenario takes a stage and asserts. Mutations of the scripts run them, too."""

import os
import signal

from tests.launch.stage import Stage

WHOLE = ["create", "scp", "install", "train", "delete"]
DONE = {"codes": [0, 0]}


def success(stage: Stage) -> None:
    played = stage.play("watch", "--config=configs/cub.py", settings={"SETUP": "touch ~/data"}, runs=[DONE])
    assert played.code == 0, played.errors
    assert stage.verbs() == WHOLE
    assert not stage.exists()
    create = next(call for call in stage.calls() if "create" in call)
    flags = {"--node-id=cmd-jax", "--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e", "--spot"}
    assert flags | {"cmd-jax", "--zone=z", "--project=p", "--quiet"} == set(create[4:])
    for worker in range(2):
        assert stage.trainings(worker) == [["--distributed", "--workdir=gs://b/run", "--config=configs/cub.py"]]
        assert (stage.fake / f"worker{worker}" / "data").exists()
        venv, packages = stage.worker_calls(worker)[:2]
        assert venv[0] == "venv"
        assert packages[:2] == ["pip", "install"]
        assert packages[-1] == ".[tpu,gcs]"
        assert "requirements.lock" in packages


def on_demand(stage: Stage) -> None:
    settings = {"SPOT": "0", "TYPE": "v5litepod-16", "NAME": "cmd-jax-cub"}
    played = stage.play("watch", settings=settings, runs=[DONE])
    assert played.code == 0, played.errors
    create = next(call for call in stage.calls() if "create" in call)
    flags = {"--node-id=cmd-jax-cub", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"}
    assert flags | {"cmd-jax-cub", "--zone=z", "--project=p", "--quiet"} == set(create[4:])


def _taken(stage: Stage, **afterwards: str) -> None:
    played = stage.play(
        "watch", "--config=c.py", runs=[{"codes": [255, 255], **afterwards}, DONE], settings={"MAX_FAILURES": "1"}
    )
    assert played.code == 0, played.errors
    assert stage.verbs() == WHOLE + WHOLE
    assert stage.trainings() == [["--distributed", "--workdir=gs://b/run", "--config=c.py"]]
    assert not stage.exists()


def suspended(stage: Stage) -> None:
    _taken(stage, state="SUSPENDED")


def suspending(stage: Stage) -> None:
    _taken(stage, state="SUSPENDING")


def failed_while_training(stage: Stage) -> None:
    _taken(stage, state="FAILED")


def node_preempted(stage: Stage) -> None:
    _taken(stage, node="PREEMPTED")


def request_failed(stage: Stage) -> None:
    creations = [["CREATING", "FAILED"], ["FAILED"], ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]]
    played = stage.play("watch", creations=creations, runs=[DONE])
    assert played.code == 0, played.errors
    assert stage.verbs() == ["create", "delete", "create", "delete", *WHOLE]


def suspended_while_waiting(stage: Stage) -> None:
    played = stage.play("watch", creations=[["PROVISIONING", "SUSPENDED"]], runs=[DONE])
    assert played.code == 0, played.errors
    assert stage.verbs() == ["create", "delete", *WHOLE]


def requests_fail_forever(stage: Stage) -> None:
    played = stage.play("watch", creations=[["FAILED"]] * 9, settings={"MAX_FAILURES": "3"})
    assert played.code == 1
    assert "gave up after 3 failures" in played.errors
    assert stage.verbs() == ["create", "delete"] * 3
    assert not stage.exists()


def request_refused(stage: Stage) -> None:
    played = stage.play("watch", refusals=["create"], runs=[DONE])
    assert played.code == 0, played.errors
    assert stage.verbs() == ["create", *WHOLE]


def _stops(stage: Stage, codes: list[int], code: int) -> None:
    played = stage.play("watch", runs=[{"codes": codes}, DONE])
    assert played.code == code, played.errors
    assert stage.verbs() == WHOLE
    assert not stage.exists()


def bad_configuration(stage: Stage) -> None:
    _stops(stage, [64, 64], 64)


def bad_data(stage: Stage) -> None:
    _stops(stage, [65, 65], 65)


def not_finite(stage: Stage) -> None:
    _stops(stage, [70, 70], 70)


def stop_code_of_another_worker(stage: Stage) -> None:
    _stops(stage, [134, 65], 65)


def saved(stage: Stage) -> None:
    played = stage.play("watch", runs=[{"codes": [75, 75]}] * 2 + [DONE], settings={"MAX_FAILURES": "1"})
    assert played.code == 0, played.errors
    assert stage.verbs() == ["create", "scp", "install", "train", "train", "train", "delete"]
    assert len(stage.trainings(1)) == 3


def crashed(stage: Stage) -> None:
    runs = [{"codes": [134, 0]}, {"codes": [75, 75]}, {"codes": [0, 1]}, DONE]
    played = stage.play("watch", runs=runs, settings={"MAX_FAILURES": "2"})
    assert played.code == 0, played.errors
    assert stage.verbs() == ["create", "scp", "install", *["train"] * 4, "delete"]


def crashes_forever(stage: Stage) -> None:
    played = stage.play("watch", runs=[{"codes": [1, 1]}] * 9, settings={"MAX_FAILURES": "3"})
    assert played.code == 1
    assert "gave up after 3 failures" in played.errors
    assert stage.verbs() == ["create", "scp", "install", "train", "train", "train", "delete"]
    assert not stage.exists()


def install_failed(stage: Stage) -> None:
    played = stage.play("watch", refusals=["scp"], runs=[DONE])
    assert played.code == 0, played.errors
    assert stage.verbs() == ["create", "scp", "scp", "install", "train", "delete"]


def setup_failed(stage: Stage) -> None:
    played = stage.play("watch", runs=[DONE], settings={"SETUP": "exit 65", "MAX_FAILURES": "2"})
    assert played.code == 1
    assert stage.verbs() == ["create", "scp", "install", "scp", "install", "delete"]


def quoting(stage: Stage) -> None:
    words = ["--config.data.folder=my photos", "--a='x' \"y\"", "--b=$HOME;`touch ~/ran` *", "--c=line\nline", "--d=\\"]
    settings = {"WORKDIR": "gs://b/a run's", "SETUP": "printf '%s' \"a  'b' $((1 + 1))\" >~/out"}
    played = stage.play("watch", *words, settings=settings, runs=[DONE])
    assert played.code == 0, played.errors
    for worker in range(2):
        assert stage.trainings(worker) == [["--distributed", "--workdir=gs://b/a run's", *words]]
        out = stage.fake / f"worker{worker}" / "out"
        assert out.exists()
        assert out.read_text() == "a  'b' 2"
        assert not (stage.fake / f"worker{worker}" / "ran").exists()


def rerun_goes_on(stage: Stage) -> None:
    played = stage.play("watch", states=["ACTIVE"], runs=[DONE])
    assert played.code == 0, played.errors
    assert stage.verbs() == WHOLE[1:]


def rerun_waits(stage: Stage) -> None:
    played = stage.play("watch", states=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], runs=[DONE])
    assert played.code == 0, played.errors
    assert stage.verbs() == WHOLE[1:]


def rerun_after_preemption(stage: Stage) -> None:
    played = stage.play("watch", states=["SUSPENDED"], runs=[DONE])
    assert played.code == 0, played.errors
    assert stage.verbs() == ["delete", *WHOLE]


def killed_and_rerun(stage: Stage) -> None:
    """A script killed outright leaves a training behind, which must save and end before another one starts."""
    stage.script(runs=[{"codes": [0, 0], "hang": True}, DONE])
    first = stage.start("watch")
    stage.wait_for("worker0/training", "worker1/training")
    first.kill()
    first.wait()
    played = stage.ended(stage.start("watch"))
    assert played.code == 0, played.errors
    assert stage.verbs() == ["create", "scp", "install", "train", "scp", "install", "train", "delete"]
    for worker in range(2):
        assert (stage.fake / f"worker{worker}" / "saved").exists()
        assert len(stage.trainings(worker)) == 2


def connection_lost(stage: Stage) -> None:
    """gcloud connects again and repeats the command, while the training of the first connection is still there."""
    played = stage.play("watch", runs=[{"codes": [0, 0], "lost": True}, DONE])
    assert played.code == 0, played.errors
    assert stage.verbs() == ["create", "scp", "install", "train", "train", "delete"]
    for worker in range(2):
        assert (stage.fake / f"worker{worker}" / "saved").exists()
        assert len(stage.trainings(worker)) == 2


def two_at_once(stage: Stage) -> None:
    stage.script(states=["ACTIVE"])
    (stage.root / "cmd-jax.p.z.cmd-jax.pid").write_text(str(os.getpid()))
    for command in ("watch", "delete"):
        played = stage.ended(stage.start(command))
        assert played.code == 64
        assert str(os.getpid()) in played.errors
    assert stage.calls() == []


def _interrupted(stage: Stage, number: signal.Signals, **settings: str) -> None:
    stage.script(runs=[{"codes": [0, 0], "hang": True}])
    process = stage.start("watch", **settings)
    stage.wait_for("worker0/training", "worker1/training")
    played = stage.interrupt(process, number)
    assert played.code == 128 + number, played.errors
    for worker in range(2):
        assert (stage.fake / f"worker{worker}" / "saved").exists()


def terminated(stage: Stage) -> None:
    _interrupted(stage, signal.SIGTERM)
    assert stage.verbs() == ["create", "scp", "install", "train", "stop", "delete"]
    assert not stage.exists()


def interrupted(stage: Stage) -> None:
    _interrupted(stage, signal.SIGINT)
    assert not stage.exists()


def hung_up(stage: Stage) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what ignores it, as below nohup, starts scripts that cannot trap it
    try:
        _interrupted(stage, signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not stage.exists()


def kept(stage: Stage) -> None:
    _interrupted(stage, signal.SIGTERM, KEEP="1")
    assert stage.exists()
    assert "delete" not in stage.verbs()


def interrupted_while_waiting(stage: Stage) -> None:
    stage.script(creations=[["WAITING_FOR_RESOURCES"]])
    process = stage.start("watch", POLL_S="20")
    while "WAITING" not in (stage.root / "errors").read_text():
        assert process.poll() is None, "the script ended"
    played = stage.interrupt(process, signal.SIGTERM)
    assert played.code == 143
    assert stage.verbs() == ["create", "delete"]


def delete(stage: Stage) -> None:
    played = stage.play("delete", states=["ACTIVE"])
    assert played.code == 0, played.errors
    assert stage.verbs() == ["delete"]
    assert stage.calls()[1][:5] == ["compute", "tpus", "queued-resources", "delete", "cmd-jax"]
    assert "--force" in stage.calls()[1]
    again = stage.play("delete")
    assert again.code == 0, again.errors
    assert stage.verbs() == ["delete"]


def delete_refused(stage: Stage) -> None:
    played = stage.play("watch", runs=[DONE], refusals=["delete"] * 3)
    assert played.code == 0, played.errors
    assert not stage.exists()


def delete_refused_forever(stage: Stage) -> None:
    played = stage.play("watch", runs=[DONE], refusals=["delete"] * 99)
    assert played.code == 1
    assert "may still cost money" in played.errors
    assert stage.exists()


def no_answer(stage: Stage) -> None:
    """A question that fails is no absence: nothing is created beside what may be there."""
    played = stage.play("watch", states=["ACTIVE"], runs=[DONE], refusals=["list"] * 3)
    assert played.code == 0, played.errors
    assert "create" not in stage.verbs()
    played = stage.play("watch", states=["ACTIVE"], runs=[DONE], refusals=["list"] * 99)
    assert played.code == 1
    assert "may still cost money" in played.errors


def usage(stage: Stage) -> None:
    wrong = [
        ((), {}),
        (("wach",), {}),
        (("watch",), {"WORKDIR": "/tmp/run"}),
        (("watch",), {"WORKDIR": ""}),
        (("watch",), {"PROJECT": ""}),
        (("delete",), {"ZONE": ""}),
        (("watch",), {"NAME": "somebody-elses"}),
        (("delete",), {"NAME": "somebody-elses"}),
        (("watch",), {"TYPE": "v9-8"}),
    ]
    for words, settings in wrong:
        played = stage.play(*words, settings=settings)
        assert played.code == 64, (words, settings, played.errors)
        assert played.errors
    assert stage.calls() == []


def status(stage: Stage) -> None:
    for state, node, condition in (([], None, "absent"), (["ACTIVE"], "READY", "ready"), (["FAILED"], "READY", "lost")):
        played = stage.play("status", states=state, node=node)
        assert (played.code, played.output) == (0, f"{condition}\n")


SCENARIOS = {
    name: value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__module__", "") == __name__ and not name.startswith("_")
}
