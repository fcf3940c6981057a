"""docs/configs.md from the source of `cmd_jax.config.default`: every key, its default, what it may be, and its comment.

python -m tests.docs.config_table > docs/configs.md
"""

import ast
import inspect
import io
import textwrap
import tokenize
from typing import NamedTuple

from cmd_jax import config as config_lib
from cmd_jax.rules import RULES, Choice, Flag, Joined, Normalization, Number, Several, Whole, keys

HEAD = """# The configuration

A file in `configs/` builds the configuration, `--config=FILE:PRESET` chooses it, and `--config.SECTION.KEY=VALUE` sets a value:

    python -m cmd_jax.main --config=configs/cub.py:dino --config.train.batch_size=128 --workdir=runs/cub_dino

Keys whose default is empty are filled from the method, the number of training images and the hardware (`resolve` in
`cmd_jax/config.py`); `config.json` in the work directory holds every value that was used. A value that cannot work is refused
before anything is read or written, with the rule and a remedy, and so is a key that does not exist. `--dry_run` shows what a
configuration means: data, shapes, memory and arithmetic.

Several values are separated by commas, `--config.eval.protocols=knn,retrieval` or `--config.views.global_scale=0.4,1`; Python's
`"('knn', 'retrieval')"` is read too. Of a flag that is given twice the later one counts.

A configuration of your own is a Python file with a function `get_config()` that returns `cmd_jax.config.default()`, changed;
the files in `configs/` are examples. This page is made of the comments in `cmd_jax/config.py` and the rules beside them.
"""


class Entry(NamedTuple):
    """A key with the comments beside it and above it."""

    key: str
    note: str


def entries(source: str) -> list[Entry]:
    """The keys that a function's source sets, with their comments.

    Args:
        source: of a function that sets `config.SECTION.KEY = ...`, one statement each.
    """
    source = textwrap.dedent(source)
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found, last = [], 0
    for statement in ast.parse(source).body[0].body:
        if not isinstance(statement, ast.Assign):
            continue
        inside = range(last + 1, statement.end_lineno + 1)
        above = [comments[line][0] for line in inside if line in comments and comments[line][1] and line < statement.lineno]
        beside = [comments[line][0] for line in inside if line in comments and line >= statement.lineno]
        last = statement.end_lineno
        key = ast.unparse(statement.targets[0]).removeprefix("config").removeprefix(".")
        if key:
            found.append(Entry(key, _sentence(" ".join(above), " ".join(beside))))
    return found


def page() -> str:
    """The whole page."""
    defaults, lines = keys(config_lib.default()), [HEAD]
    for key, note in entries(inspect.getsource(config_lib.default)):
        if key in defaults:
            if "." not in key:
                lines += ["| key | default | may be | |", "|---|---|---|---|"]
            lines.append(f"| `{key}` | {_code(defaults[key])} | {_escape(_allowed(RULES[key]))} | {_escape(note)} |")
        else:  # a section
            lines += ["", f"## {key}", "", *([f"{note[:1].upper()}{note[1:]}.", ""] if note else [])]
            lines += ["| key | default | may be | |", "|---|---|---|---|"]
    return "\n".join(lines) + "\n"


def _sentence(above: str, beside: str) -> str:
    return ". ".join(part.rstrip(".") for part in (beside, above) if part)


def _allowed(rule) -> str:
    if isinstance(rule, Whole | Number):
        return rule.broken(float("inf")).removeprefix("a ") if isinstance(rule, Number) else _whole(rule)
    if isinstance(rule, Several):
        return f"{rule.length or 'one or more'} numbers, {_allowed(rule.of)}"
    if isinstance(rule, Choice):
        return " ".join(f"`{word}`" for word in rule.words)
    if isinstance(rule, Normalization):
        return " ".join(f"`{word}`" for word in rule.words) + ", or MEAN/STD"
    if isinstance(rule, Joined):
        return " ".join(f"`{word}`" for word in rule.words) + ", or several joined by `+`"
    return "True, False" if isinstance(rule, Flag) else "text"


def _whole(rule: Whole) -> str:
    return ("" if rule.also is None else f"{rule.also}, or ") + f"{rule.low} to {rule.high:,}"


def _code(value) -> str:
    return "" if value is None else f"`{value!r}`"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
