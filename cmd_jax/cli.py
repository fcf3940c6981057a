"""What every binary shares: a user's mistake ends with one clear line and an exit code, not with a traceback."""

import functools
import os
import sys
from collections.abc import Callable

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from cmd_jax.config import ConfigDict, ConfigError
from cmd_jax.data.decode import BadImage
from cmd_jax.data.errors import DatasetError
from cmd_jax.training import processes
from cmd_jax.training.checkpoint import CheckpointError, SaveError
from cmd_jax.training.health import NonFinite
from cmd_jax.training.preemption import Preempted
from cmd_jax.weights.errors import WeightsError

# 0 is success; launchers stop on the first three and run the command again on any other code.
BAD_CONFIG, BAD_DATA, SICK_RUN, CANNOT_SAVE, PREEMPTED = 64, 65, 70, 74, 75

_DEBUG = flags.DEFINE_bool("debug", False, "show the traceback of an error")
_COMPILE_CACHE = flags.DEFINE_string(
    "compile_cache",
    os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.join("~", ".cache", "cmd_jax")),
    "directory of compiled programs, read by later runs; empty: none; JAX_COMPILATION_CACHE_DIR sets the default",
)


_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "one of several processes; Cloud TPU and SLURM need no other flag")
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, with --distributed")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "of the run, with --distributed", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process_id", None, "of this process, from 0, with --distributed", lower_bound=0)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_s", 100, "seconds after which all processes stop when one is gone, with --distributed", lower_bound=5
)


def join_processes() -> None:
    """Joins this process to the others, where --distributed says that there are others.

    Raises:
        ConfigError: the flags do not fit together, or no cluster is found.
    """
    if _DISTRIBUTED.value:
        processes.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _HEARTBEAT.value)
    elif any(flag.value is not None for flag in (_COORDINATOR, _PROCESSES, _PROCESS)):
        raise ConfigError("--coordinator_address, --num_processes and --process_id need --distributed; add it")


def run(main: Callable[..., None], usage: str, words: int = 0) -> None:
    """Parses the flags and runs a binary.

    Args:
        main: reads the parsed flags; called with the words of the command line that are no flags.
        usage: shown by --help above the flags.
        words: how many there may be.
    """
    sys.modules["__main__"].__doc__ = usage
    app.run(lambda arguments: _guarded(lambda: main(*arguments[1:])), flags_parser=functools.partial(_parse, words=words))


def given_config() -> ConfigDict:
    """The value of the flag --config, which the binary defines.

    Raises:
        ConfigError: it is missing, or names no file.
    """
    config, remedy = flags.FLAGS["config"].value, "pass a file such as --config=configs/demo.py"
    if config is None:
        raise ConfigError(f"--config is missing; {remedy}")
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    if not os.path.exists(path.split(":")[0]):
        raise ConfigError(f"--config={path} does not exist; {remedy}")
    return config


def _parse(arguments: list[str], words: int) -> list[str]:
    try:
        rest = flags.FLAGS(arguments)
    except (flags.Error, KeyError, AttributeError, ValueError, OSError) as error:
        _stop(BAD_CONFIG, error)
    except SystemExit:  # absl ends with 1 after printing a --help
        sys.exit(0)
    if len(rest) > 1 + words:
        _stop(BAD_CONFIG, ConfigError(f"unexpected argument {rest[1 + words]!r}; every option starts with --"))
    logging.set_verbosity(logging.ERROR)
    return rest


def _guarded(main: Callable[[], None]) -> None:
    codes = {
        ConfigError: BAD_CONFIG,
        BadImage: BAD_DATA,
        DatasetError: BAD_DATA,
        CheckpointError: BAD_DATA,
        WeightsError: BAD_DATA,
        NonFinite: SICK_RUN,
        SaveError: CANNOT_SAVE,
        Preempted: PREEMPTED,
    }
    if _COMPILE_CACHE.value:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(_COMPILE_CACHE.value))
    try:
        main()
    except tuple(codes) as error:
        if _DEBUG.value:
            raise
        _stop(next(code for kind, code in codes.items() if isinstance(error, kind)), error)


def _stop(code: int, error: Exception) -> None:
    print(f"{'preempted' if code == PREEMPTED else 'error'}: {_one_line(error)}", file=sys.stderr)
    sys.exit(code)


def _one_line(error: Exception) -> str:
    """The message of an error on one line."""
    text = str(error.args[0] if error.args else error)
    if text.startswith("'"):  # a KeyError inside a KeyError: its quotes and line ends are spelled out
        text = text.strip("'").replace("\\'", "'").replace("\\n", "\n")
    lines = [line for line in text.splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        # ml_collections puts the traceback of a config file's own error into its message; the last line says what is wrong.
        lines = [lines[-1].split(": ", 1)[-1]]
    return " ".join(line.strip() for line in lines)
