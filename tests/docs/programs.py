"""Runs modules of the package one after another, each in a process that has the libraries already: their import is most of a
short command's time.

    python -m tests.docs.programs < COMMANDS

COMMANDS is a JSON list of lists [module, argument, ...]. Ends with the code of the first that fails, after its words.
"""

import json
import os
import runpy
import sys

import cmd_jax.api
import cmd_jax.report.compare
import cmd_jax.training.loop  # noqa: F401


def run(module: str, *arguments: str) -> int:
    """Exit code of a module's `__main__` in a copy of this process, which has not touched a device yet."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
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


def main() -> None:
    for command in json.load(sys.stdin):
        code = run(*command)
        if code:
            sys.exit(f"{' '.join(command)} ended with {code}")


if __name__ == "__main__":
    main()
