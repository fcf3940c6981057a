"""launch/tpu_vm.sh and tpu_worker.sh against a fake gcloud."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

HERE = pathlib.Path(__file__).parent
LAUNCH = HERE.parents[1] / "launch"
GCLOUD = shutil.which("gcloud")
SETTINGS = {"PROJECT": "p", "ZONE": "z", "WORKDIR": "gs://b/run", "POLL_S": "0.02", "STOP_S": "10"}
UNSET = ("NAME", "TYPE", "SPOT", "SETUP", "KEEP", "MAX_FAILURES", "RUNTIME")
WHOLE = ["create", "scp", "install", "train", "delete"]
DONE = {"codes": [0, 0]}
HANGS = {"codes": [0, 0], "hang": True}


class Cloud:
    """A checkout with the launch scripts beside a fake gcloud."""

    def __init__(self, root: pathlib.Path):
        self.root, self.repo, self.fake = root, root / "repo", root / "fake"
        shutil.copytree(LAUNCH, self.repo / "launch")
        for name in ("bin/gcloud", "worker-bin/uv"):
            (self.fake / name).parent.mkdir(parents=True)
            shutil.copy(HERE / "fake_gcloud.py", self.fake / name)
            (self.fake / name).chmod(0o755)
        author = ("-c", "user.name=tests", "-c", "user.email=tests@localhost")
        for words in (("init", "-q"), ("add", "-A"), (*author, "commit", "-qm", "launch")):
            subprocess.run(["git", *words], cwd=self.repo, check=True)
        for worker in range(2):
            (self.fake / f"worker{worker}").mkdir()
        self.script()

    def script(self, **script) -> None:
        """What the cloud will do: keys of fake_gcloud.py."""
        defaults = {"creations": [], "runs": [], "refusals": [], "states": [], "node": "READY"}
        (self.fake / "script.json").write_text(json.dumps(defaults | script))

    def start(self, *words: str, **settings: str) -> subprocess.Popen:
        environ = {name: value for name, value in os.environ.items() if name not in UNSET}
        path = f"{self.fake / 'bin'}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
        environ |= {"PATH": path, "FAKE": str(self.fake), "TMPDIR": str(self.root)} | SETTINGS | settings
        with open(self.root / "output", "w") as output, open(self.root / "errors", "w") as errors:
            # bash cannot trap a signal that was ignored when it started.
            reset = lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)]
            command = ["bash", self.repo / "launch/tpu_vm.sh", *words]
            return subprocess.Popen(command, env=environ, stdout=output, stderr=errors, preexec_fn=reset)

    def end(self, process: subprocess.Popen) -> int:
        try:
            return process.wait(timeout=30)
        finally:
            process.kill()

    def watch(self, *words: str, settings: dict[str, str] | None = None, **script) -> int:
        """The exit code of `tpu_vm.sh watch`."""
        self.script(**script)
        return self.end(self.start("watch", *words, **(settings or {})))

    def wait_for_training(self) -> None:
        end = time.monotonic() + 20
        while not all((self.fake / f"worker{worker}" / "training").exists() for worker in range(2)):
            assert time.monotonic() < end, self.errors
            time.sleep(0.02)

    @property
    def errors(self) -> str:
        return (self.root / "errors").read_text()

    @property
    def calls(self) -> list[list[str]]:
        return _lines(self.fake / "calls.jsonl")

    @property
    def exists(self) -> bool:
        return bool(json.loads((self.fake / "script.json").read_text())["states"])

    def verbs(self) -> list[str]:
        """The calls that change something, in order."""
        verbs = []
        for call in self.calls:
            remote = re.findall(r"tpu_worker\.sh (install|train|stop|code)", " ".join(call))
            verbs.append("install" if "install" in remote else remote[0] if remote else call[3])
        return [verb for verb in verbs if verb not in ("list", "code")]

    def trainings(self, worker: int = 0) -> list[list[str]]:
        """Flags of the trainings on a worker since it was created."""
        calls = _lines(self.fake / f"worker{worker}" / "calls.jsonl")
        return [call[2:] for call in calls if call[:2] == ["-m", "cmd_jax.main"]]

    def saved(self) -> bool:
        return all((self.fake / f"worker{worker}" / "saved").exists() for worker in range(2))


def _lines(path: pathlib.Path) -> list[list[str]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.mark.parametrize(
    ("settings", "name", "kind", "runtime", "spot"),
    [
        ({}, "cmd-jax", "v6e-8", "v2-alpha-tpuv6e", {"--spot"}),
        (
            {"SPOT": "0", "TYPE": "v5litepod-16", "NAME": "cmd-jax-cub"},
            "cmd-jax-cub",
            "v5litepod-16",
            "v2-alpha-tpuv5-lite",
            set(),
        ),
    ],
)
def test_creates_trains_and_deletes(settings, name, kind, runtime, spot, cloud):
    assert cloud.watch("--config=configs/cub.py", settings=settings, runs=[DONE]) == 0, cloud.errors
    assert cloud.verbs() == WHOLE
    assert not cloud.exists
    create, delete = (next(call for call in cloud.calls if call[3] == verb) for verb in ("create", "delete"))
    flags = {f"--node-id={name}", f"--accelerator-type={kind}", f"--runtime-version={runtime}", *spot}
    assert set(create[4:]) == {name, "--zone=z", "--project=p", "--quiet"} | flags
    assert set(delete[4:]) == {name, "--zone=z", "--project=p", "--quiet", "--force"}
    for worker in range(2):
        assert cloud.trainings(worker) == [["--distributed", "--workdir=gs://b/run", "--config=configs/cub.py"]]
        venv, packages = _lines(cloud.fake / f"worker{worker}" / "calls.jsonl")[:2]
        assert (venv[0], packages[:2], packages[-1]) == ("venv", ["pip", "install"], ".[tpu,gcs]")
        assert "requirements.lock" in packages


def test_arguments_arrive_as_given(cloud):
    words = ["--config.data.folder=my photos", "--a='x' \"y\"", "--b=$HOME;`touch ~/ran` *", "--c=line\nline", "--d=\\"]
    settings = {"WORKDIR": "gs://b/a run's", "SETUP": "printf '%s' \"a  'b' $((1 + 1))\" >~/out"}
    assert cloud.watch(*words, settings=settings, runs=[DONE]) == 0, cloud.errors
    for worker in range(2):
        assert cloud.trainings(worker) == [["--distributed", "--workdir=gs://b/a run's", *words]]
        assert (cloud.fake / f"worker{worker}" / "out").read_text() == "a  'b' 2"
        assert not (cloud.fake / f"worker{worker}" / "ran").exists()


TAKEN = {"codes": [255, 255]}
SAVED = {"codes": [75, 75]}
DONE_IN_THE_END = {  # what happens, and the calls that change something
    "suspended": ({"runs": [TAKEN | {"state": "SUSPENDED"}, DONE]}, WHOLE + WHOLE),
    "suspending": ({"runs": [TAKEN | {"state": "SUSPENDING"}, DONE]}, WHOLE + WHOLE),
    "failed": ({"runs": [TAKEN | {"state": "FAILED"}, DONE]}, WHOLE + WHOLE),
    "node preempted": ({"runs": [TAKEN | {"node": "PREEMPTED"}, DONE]}, WHOLE + WHOLE),
    "saved and crashed": (
        {"runs": [SAVED, {"codes": [134, 0]}, SAVED, {"codes": [0, 1]}, DONE]},
        [*WHOLE[:3], *["train"] * 5, "delete"],
    ),
    "request failed": (
        {"creations": [["CREATING", "FAILED"], ["WAITING_FOR_RESOURCES", "ACTIVE"]]},
        ["create", "delete", *WHOLE],
    ),
    "request suspended": ({"creations": [["PROVISIONING", "SUSPENDED"]]}, ["create", "delete", *WHOLE]),
    "request refused": ({"refusals": ["create"]}, ["create", *WHOLE]),
    "copy refused": ({"refusals": ["scp"]}, ["create", "scp", *WHOLE[1:]]),
    "delete refused": ({"refusals": ["delete"] * 2}, [*WHOLE, "delete", "delete"]),
    "exists": ({"states": ["ACTIVE"], "refusals": ["list"] * 3}, WHOLE[1:]),
    "is queued": ({"states": ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]}, WHOLE[1:]),
    "was preempted": ({"states": ["SUSPENDED"]}, ["delete", *WHOLE]),
}


@pytest.mark.parametrize("name", DONE_IN_THE_END)
def test_goes_on_until_done(name, cloud):
    script, verbs = DONE_IN_THE_END[name]
    assert cloud.watch(settings={"MAX_FAILURES": "2"}, **{"runs": [DONE]} | script) == 0, cloud.errors
    assert cloud.verbs() == verbs
    assert not cloud.exists


@pytest.mark.parametrize(("codes", "code"), [([64, 64], 64), ([65, 65], 65), ([70, 70], 70), ([134, 65], 65)])
def test_stops_where_a_retry_would_repeat(codes, code, cloud):
    assert cloud.watch(runs=[{"codes": codes}, DONE]) == code, cloud.errors
    assert cloud.verbs() == WHOLE
    assert not cloud.exists


@pytest.mark.parametrize(
    ("script", "settings", "verbs"),
    [
        ({"runs": [{"codes": [1, 1]}] * 9}, {}, ["create", "scp", "install", *["train"] * 3, "delete"]),
        ({"creations": [["FAILED"]] * 9}, {}, ["create", "delete"] * 3),
        ({}, {"SETUP": "exit 65"}, ["create", *["scp", "install"] * 3, "delete"]),
    ],
    ids=["crashes", "failed requests", "failed setups"],
)
def test_gives_up_after_max_failures(script, settings, verbs, cloud):
    assert cloud.watch(settings={"MAX_FAILURES": "3", **settings}, **script) == 1
    assert "gave up after 3 failures" in cloud.errors
    assert cloud.verbs() == verbs
    assert not cloud.exists


@pytest.mark.parametrize("refusals", [["delete"] * 99, ["list"] * 99])
def test_says_what_may_still_cost(refusals, cloud):
    assert cloud.watch(states=["ACTIVE"], runs=[DONE], refusals=refusals) == 1
    assert "may still cost money" in cloud.errors
    assert "create" not in cloud.verbs()
    assert cloud.exists


def test_continues_after_being_killed(cloud):
    """The training that the killed script left behind saves and ends before another one starts."""
    cloud.script(runs=[HANGS, DONE])
    first = cloud.start("watch")
    cloud.wait_for_training()
    first.kill()
    first.wait()
    assert cloud.end(cloud.start("watch")) == 0, cloud.errors
    assert cloud.verbs() == ["create", "scp", "install", "train", "scp", "install", "train", "delete"]
    assert cloud.saved()


def test_lost_connection_starts_no_second_training(cloud):
    assert cloud.watch(runs=[{"codes": [0, 0], "lost": True}, DONE]) == 0, cloud.errors
    assert cloud.verbs() == ["create", "scp", "install", "train", "train", "delete"]
    assert cloud.saved()
    assert len(cloud.trainings()) == 2


@pytest.mark.parametrize(
    ("number", "keep"), [(signal.SIGTERM, "0"), (signal.SIGINT, "0"), (signal.SIGHUP, "0"), (signal.SIGTERM, "1")]
)
def test_saves_and_deletes_when_interrupted(number, keep, cloud):
    cloud.script(runs=[HANGS])
    process = cloud.start("watch", KEEP=keep)
    cloud.wait_for_training()
    process.send_signal(number)
    assert cloud.end(process) == 128 + number, cloud.errors
    assert cloud.saved()
    assert cloud.exists == (keep == "1")


def test_deletes_when_interrupted_in_the_queue(cloud):
    cloud.script(creations=[["WAITING_FOR_RESOURCES"]])
    process = cloud.start("watch", POLL_S="20")
    while "WAITING" not in cloud.errors:
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert cloud.end(process) == 143
    assert cloud.verbs() == ["create", "delete"]


def test_status_and_delete(cloud):
    for states, condition in (([], "absent"), (["FAILED"], "lost"), (["ACTIVE"], "ready")):
        cloud.script(states=states)
        assert cloud.end(cloud.start("status")) == 0
        assert (cloud.root / "output").read_text() == f"{condition}\n"
    for _ in range(2):  # the second finds nothing
        assert cloud.end(cloud.start("delete")) == 0
        assert cloud.verbs() == ["delete"]


def test_refuses_wrong_usage(cloud):
    (cloud.root / "cmd-jax.p.z.cmd-jax.pid").write_text(str(os.getpid()))  # another watch of the same TPU
    wrong = [{}, {"WORKDIR": "/tmp/run"}, {"PROJECT": ""}, {"ZONE": ""}, {"NAME": "somebody-elses"}, {"TYPE": "v9-8"}]
    for words, settings in [(["watch"], each) for each in wrong] + [(["delete"], {}), ([], {}), (["wach"], {})]:
        assert cloud.end(cloud.start(*words, **settings)) == 64, (words, settings)
        assert cloud.errors
    assert cloud.calls == []


@pytest.mark.skipif(GCLOUD is None, reason="no Google Cloud SDK on the PATH")
def test_gcloud_accepts_every_call(cloud):
    """The SDK's own linter reads what the script calls and what the README says to call."""
    assert cloud.watch(states=["FAILED"], runs=[{"codes": [1, 1]}, DONE]) == 0, cloud.errors
    readme = re.sub(r"\\\n\s*", "", (LAUNCH / "README.md").read_text())
    documented = re.findall(r"^    (?:\w+=\$\()?(gcloud .*?)\)?$", readme, re.MULTILINE)
    calls = [re.sub(r"\$(\w+)", lambda match: match[1].lower(), call) for call in documented]
    calls += sorted({shlex.join(["gcloud", *call]) for call in cloud.calls})
    calls += ["gcloud compute tpus queued-resources create x --accelerator-typ=v6e-8"]
    (cloud.root / "calls.json").write_text(json.dumps([{"command_string": call} for call in calls]))
    environ = {**os.environ, "CLOUDSDK_CONFIG": str(cloud.root / "config"), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    words = [GCLOUD, "meta", "lint-gcloud-commands", f"--commands-file={cloud.root / 'calls.json'}"]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=120, check=True)
    *errors, misspelt = (result["error_message"] for result in json.loads(done.stdout))
    assert errors == [None] * (len(calls) - 1)
    assert "--accelerator-type" in misspelt
