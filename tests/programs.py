"""Modules of the package as programs, each in a process that has the libraries already: their import is most of a short
command's time."""

import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Programs:
    """A process that answers each command with a copy of itself, which has not touched a device yet.

    Args:
        cwd: where they run.
        flags: of Python.
        environment: variables beside those of this process.
    """

    def __init__(self, cwd=ROOT, flags=(), **environment):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment
        command = [sys.executable, *flags, "-m", "tests.programs"]
        self._process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.communicate()

    def run(self, module, *arguments):
        """`python -m MODULE ARGUMENT ...`, as a `subprocess.CompletedProcess`."""
        self._process.stdin.write(json.dumps([module, *arguments]) + "\n")
        self._process.stdin.flush()
        return subprocess.CompletedProcess([module, *arguments], *json.loads(self._process.stdout.readline()))


def _answer(module, *arguments):
    """Exit code, stdout and stderr of a module's `__main__`."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            _become(module, arguments)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in (out, err):
            file.seek(0)
        return code, out.read(), err.read()


def _become(module, arguments):
    code = 1
    try:
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _main():
    import cmd_jax.api
    import cmd_jax.report.compare
    import cmd_jax.train_and_evaluate  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(_answer(*json.loads(line))), flush=True)


if __name__ == "__main__":
    _main()
