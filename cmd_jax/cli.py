"""What every binary shares: flags, and one line with an exit code instead of a traceback for a user's mistake."""

import errno
import functools
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from cmd_jax import errors, files
from cmd_jax.config import ConfigDict, validate
from cmd_jax.errors import ConfigError
from cmd_jax.text import printable

LESS_MEMORY = (
    "raise train.accumulate, set model.remat=full or model.dtype=bfloat16, lower method.prototype_chunk, views.local_count or "
    "train.batch_size (in an evaluation eval.batch_size, in cmd_jax.embed --batch_size)"
)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PATH = {  # errors of the system that a path on the command line or in the configuration causes, with the remedy
    errno.EACCES: "allow it, or choose another path",
    errno.EPERM: "allow it, or choose another path",
    errno.EROFS: "choose a path that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a file lies where a directory should; choose another path",
    errno.EEXIST: "a file lies where a directory should; choose another path",
    errno.EISDIR: "a directory lies where a file should; choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "its links lead in a circle; choose another path",
}


class TupleParser(flags.ArgumentParser):
    """Text -> tuple: elements separated by commas, in parentheses, brackets or neither.

    An element is a number, or a word with or without quotes. The last of several flags counts, as for flags of other types;
    the parser of ml_collections wants quotes, and joins the flags.
    """

    syntactic_help = "elements separated by commas"

    def parse(self, argument: str | tuple) -> tuple[int | float | str, ...]:
        if isinstance(argument, tuple):  # a default
            return argument
        text = argument.strip()
        if text[:1] + text[-1:] in ("()", "[]"):
            text = text[1:-1].strip()
        elements = text.removesuffix(",").split(",")  # Python writes a tuple of one as (5,)
        return tuple(_element(element.strip()) for element in elements) if text else ()

    def flag_type(self) -> str:
        return "tuple"


def _element(text: str) -> int | float | str:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


config_flags.register_flag_parser_for_type(tuple, TupleParser())
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
        from cmd_jax.training import processes  # imported after the flags are checked: it loads jax

        processes.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _HEARTBEAT.value)
    elif any(flag.value is not None for flag in (_COORDINATOR, _PROCESSES, _PROCESS)):
        raise ConfigError("--coordinator_address, --num_processes and --process_id need --distributed; add it")


def start_jax() -> None:
    """Loads jax and sets its directory of compiled programs.

    A binary calls it once its flags are checked: loading takes seconds, which --help and a wrong flag need not wait for.
    """
    import jax

    if _COMPILE_CACHE.value:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(_COMPILE_CACHE.value))


def run(main: Callable[..., None], usage: str, words: int = 0) -> None:
    """Parses the flags and runs a binary.

    Args:
        main: reads the parsed flags; called with the words of the command line that are not flags.
        usage: shown by --help above the flags.
        words: how many there may be.
    """
    sys.modules["__main__"].__doc__ = usage
    app.run(lambda arguments: _guarded(lambda: main(*arguments[1:])), flags_parser=functools.partial(_parse, words=words))


def given_config(weights: str | None = None) -> ConfigDict:
    """The value of the flag --config, which the binary defines, checked as far as it can be without data and devices.

    Args:
        weights: `init.weights` that the command line names without a key.

    Raises:
        ConfigError: it is missing, names no file, or a value in it cannot work.
    """
    config, remedy = flags.FLAGS["config"].value, "pass a file such as --config=configs/demo.py"
    if config is None:
        raise ConfigError(f"--config is missing; {remedy}")
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    if not os.path.exists(path.split(":")[0]):
        raise ConfigError(f"--config={path} does not exist; {remedy}")
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"get_config returned a {type(config).__name__}; return cmd_jax.config.default(), changed")
    if weights is not None:
        config.init.weights = weights
    validate(config)
    return config


def check_workdir(workdir: str) -> None:
    """Checks before any work that a directory can be written.

    Raises:
        ConfigError: it cannot.
    """
    if files.is_remote(workdir):
        refusal = files.refusal(workdir)
        if refusal:
            raise ConfigError(f"--workdir={refusal}")
        return
    place = os.path.abspath(workdir)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise ConfigError(f"--workdir={workdir} cannot be a directory, {place} is a file; choose another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"--workdir={workdir} cannot be written, {place} does not allow it; choose another")


def _parse(arguments: list[str], words: int) -> list[str]:
    debug = "--debug" in arguments  # not parsed when parsing is what fails
    try:
        rest = flags.FLAGS(arguments)
        if len(rest) > 1 + words:
            raise ConfigError(f"unexpected argument {rest[1 + words]!r}; every option starts with --")
    except (flags.Error, KeyError, AttributeError, ValueError, OSError) as error:
        _stop(errors.BAD_CONFIG, _one_line(error), debug)
    except Exception as error:  # a configuration is a program of the user's
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if isinstance(error, SyntaxError) else f" ({where.filename}, line {where.lineno})"
        _stop(errors.BAD_CONFIG, f"{type(error).__name__}: {error}{place}", debug)
    except SystemExit:  # absl ends with 1 after printing a --help
        sys.exit(0)
    logging.set_verbosity(logging.ERROR)
    return rest


def _guarded(main: Callable[[], None]) -> None:
    try:
        main()
    except Exception as error:
        judged = _judge(error)
        if judged is None:
            raise
        _stop(*judged, debug=_DEBUG.value)
    except KeyboardInterrupt:
        _stop(errors.INTERRUPTED, "interrupted", debug=_DEBUG.value)


def _judge(error: Exception) -> tuple[int, str] | None:
    """Exit code and message of an error that running again does not cure; None of any other."""
    if hasattr(error, "exit_code"):
        return error.exit_code, _one_line(error)
    if _is_memory(error):  # the same program takes the same memory the next time
        return errors.BAD_CONFIG, f"out of memory ({_one_line(error)}); {LESS_MEMORY}"
    if isinstance(error, OSError) and error.errno in _FULL:
        place = os.fspath(error.filename or ".")
        return errors.BAD_DATA, f"{place}: {error.strerror}, {_free_gib(place):.2f} GiB are free; make room and run again"
    if isinstance(error, OSError) and error.errno in _PATH and error.filename is not None:
        return errors.BAD_CONFIG, f"{os.fsdecode(error.filename)}: {error.strerror}; {_PATH[error.errno]}"
    return None


def _is_memory(error: Exception) -> bool:
    jax = sys.modules.get("jax")  # an error of its runtime comes from a process that has loaded it
    of_device = jax is not None and isinstance(error, jax.errors.JaxRuntimeError)
    return isinstance(error, MemoryError) or (of_device and _one_line(error).startswith("RESOURCE_EXHAUSTED"))


def _free_gib(path: str) -> float:
    while not os.path.exists(path):
        path = os.path.dirname(path) or "."
    return shutil.disk_usage(path).free / 2**30


def _stop(code: int, message: str, debug: bool) -> NoReturn:
    """Ends the process from inside an `except`."""
    if debug:
        traceback.print_exc()
    word = {errors.INTERRUPTED: "", errors.PREEMPTED: "preempted: "}.get(code, "error: ")
    print(f"{word}{printable(message)}", file=sys.stderr)
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
