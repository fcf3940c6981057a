"""Plays launch scripts against stand-ins for the clouds."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
LAUNCH = HERE.parents[1] / "launch"
SETTINGS = ("NAME", "TYPE", "SPOT", "SETUP", "KEEP", "MAX_FAILURES", "RUNTIME", "PYTHON")


@dataclasses.dataclass
class Stage:
    """A checkout with the scripts of a directory, and a gcloud whose resource it plays.

    Args:
        root: an empty directory.
        launch: where the scripts come from; mutations bring their own.
    """

    root: pathlib.Path
    launch: pathlib.Path = LAUNCH

    def __post_init__(self):
        self.repo, self.fake = self.root / "repo", self.root / "fake"
        shutil.copytree(self.launch, self.repo / "launch")
        for directory, stand_in, name in (("bin", "fake_gcloud.py", "gcloud"), ("worker-bin", "fake_python.py", "uv")):
            (self.fake / directory).mkdir(parents=True)
            shutil.copy(HERE / stand_in, self.fake / directory / name)
            (self.fake / directory / name).chmod(0o755)
        author = ("-c", "user.name=tests", "-c", "user.email=tests@localhost")
        for words in (("init", "-q"), ("add", "-A"), (*author, "commit", "-qm", "launch")):
            subprocess.run(["git", *words], cwd=self.repo, check=True)

    def start(self, *words: str, **settings: str) -> subprocess.Popen:
        """Starts `launch/tpu_vm.sh`; settings are environment variables."""
        environ = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        defaults = {"PROJECT": "p", "ZONE": "z", "WORKDIR": "gs://b/run", "POLL_S": "0.02", "STOP_S": "10"}
        path = f"{self.fake / 'bin'}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
        environ |= {"PATH": path, "FAKE": str(self.fake), "TMPDIR": str(self.root), **defaults, **settings}
        command = ["bash", str(self.repo / "launch/tpu_vm.sh"), *words]
        # Files, for pipes would stay open as long as whatever a script left behind.
        with open(self.root / "output", "w") as output, open(self.root / "errors", "w") as errors:
            # bash cannot trap what was ignored when it started, as SIGINT is in the background.
            reset = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
            return subprocess.Popen(command, env=environ, stdout=output, stderr=errors, preexec_fn=reset)

    def play(self, *words: str, settings: dict[str, str] | None = None, **script) -> "Played":
        """Runs the script to its end, with what the cloud will do."""
        self.script(**script)
        return self.ended(self.start(*words, **(settings or {})))

    def script(self, **script) -> None:
        whole = {"creations": [], "runs": [], "refusals": [], "states": [], "node": "READY"} | script
        (self.fake / "script.json").write_text(json.dumps(whole))
        for worker in range(2):
            (self.fake / f"worker{worker}").mkdir(exist_ok=True)

    def ended(self, process: subprocess.Popen) -> "Played":
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"the script did not end; calls: {self.verbs()[-20:]}") from None
        return Played(process.returncode, (self.root / "output").read_text(), (self.root / "errors").read_text(), self)

    def interrupt(self, process: subprocess.Popen, number: signal.Signals) -> "Played":
        process.send_signal(number)
        return self.ended(process)

    def wait_for(self, *paths: str) -> None:
        """Waits for files of the stand-ins."""
        for path in paths:
            end = time.monotonic() + 20
            while not (self.fake / path).exists():
                assert time.monotonic() < end, f"{path} never came; calls: {self.verbs()}"
                time.sleep(0.02)

    def calls(self) -> list[list[str]]:
        return _lines(self.fake / "calls.jsonl")

    def worker_calls(self, worker: int) -> list[list[str]]:
        """What uv and python were called with on a worker."""
        return _lines(self.fake / f"worker{worker}" / "calls.jsonl")

    def trainings(self, worker: int = 0) -> list[list[str]]:
        """Words after `python -m cmd_jax.main` on a worker since it was created."""
        return [call[2:] for call in self.worker_calls(worker) if call[:2] == ["-m", "cmd_jax.main"]]

    def verbs(self) -> list[str]:
        """The calls that change something."""
        verbs = []
        for call in self.calls():
            command = next((word for word in call if word.startswith("--command=")), "")
            kinds = ("install", "train", "stop", "code")
            verb = next((kind for kind in kinds if f"tpu_worker.sh {kind}" in command), call[3])
            if verb not in ("list", "code"):
                verbs.append(verb)
        return verbs

    def exists(self) -> bool:
        return bool(json.loads((self.fake / "script.json").read_text())["states"])


@dataclasses.dataclass
class Played:
    """How a script ended."""

    code: int
    output: str
    errors: str
    stage: Stage


def _lines(path: pathlib.Path) -> list[list[str]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
