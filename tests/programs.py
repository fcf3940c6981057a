"""Modules of the package as programs, each in a process that has the libraries already: their import is most of a short
command's time."""

import atexit
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = ("-W", "error::FutureWarning")  # of Python
# Also what a command imports only when it gets there: every copy would do it again.
IMPORTED = (
    "cmd_jax.api",
    "cmd_jax.labelling.commands",
    "cmd_jax.report.compare",
    "cmd_jax.train_and_evaluate",
    "matplotlib.figure",
    "PIL.PngImagePlugin",
    "plotly.offline",
    "pyarrow.parquet",
    "scipy.optimize",
    "scipy.stats",
    "sklearn.decomposition",
    "sklearn.discriminant_analysis",
    "sklearn.linear_model",
    "sklearn.manifold",
    "sklearn.model_selection",
    "sklearn.pipeline",
)


class Programs:
    """A process that answers each command with a copy of itself, which has not touched a device yet.

    Args:
        flags: of Python.
        environment: variables beside those of this process.
    """

    def __init__(self, flags=(), **environment):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment
        command = [sys.executable, *flags, "-m", "tests.programs"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.communicate()

    def start(self, module, *arguments, stdout, stderr, cwd=""):
        """`python -m MODULE ARGUMENT ...` with its output in files, as a `Program` that goes on."""
        for path in (stdout, stderr):
            Path(path).touch()
        return Program(self._ask, self._ask(str(cwd), str(stdout), str(stderr), module, *map(str, arguments)))

    def run(self, module, *arguments, cwd=""):
        """`python -m MODULE ARGUMENT ...`, as a `subprocess.CompletedProcess`."""
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
            code = self.start(module, *arguments, stdout=out.name, stderr=err.name, cwd=cwd).wait()
            return subprocess.CompletedProcess([module, *arguments], code, out.read(), err.read())

    def _ask(self, *question):
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class Program:
    """A process that was started; the methods are those of `subprocess.Popen`."""

    def __init__(self, ask, pid):
        self._ask, self._pid, self._code = ask, pid, None

    def poll(self):
        if self._code is None:
            self._code = self._ask(self._pid)
        return self._code

    def wait(self, timeout=600):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self._pid), timeout)
            time.sleep(0.01)
        return self._code

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self._pid, number)


def _main():
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        question = json.loads(line)
        if len(question) == 1:
            pid, status = os.waitpid(question[0], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                _become(*question)
        print(json.dumps(answer), flush=True)


def _become(cwd, stdout, stderr, module, *arguments):
    """Ends as a program does, without the second that taking the libraries apart takes."""
    for name, number in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd or ".")
    code = 1
    try:
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _main()
