"""The commands that README.md and docs/ show."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
STARTS = ("make", "pip", "tfds", "taskset", "launch/", "gcloud", ".venv/bin/python", "python")
# What a comment behind a command may say that a test cannot have.
NEEDS = re.compile(
    r"needs (a cloud|a GPU|a cluster|a download|a labels.csv|CUB|DINO's file|the extra onnx|a run with train.best_metric"
    r"|minutes)"
)


class Command(NamedTuple):
    """One line of a code block.

    Attributes:
        page: file name.
        words: of the command, as a shell splits it.
        needs: what the comment behind it says it needs; empty if nothing.
    """

    page: str
    words: tuple[str, ...]
    needs: str


def commands() -> list[Command]:
    """All of them, in the order of the pages."""
    return [command for page in PAGES for command in commands_of(page.name, page.read_text())]


def commands_of(page: str, text: str) -> list[Command]:
    """Those of a page: lines of its code blocks that begin like a command; a backslash continues one."""
    found = []
    for line in code_lines(text.replace("\\\n", " ")):
        if line.split(" ")[0].startswith(STARTS):
            words = shlex.split(line, comments=True)
            comment = line.partition("  #")[2]
            needs = NEEDS.search(comment)
            found.append(Command(page, tuple(words), needs[0] if needs else ""))
    return found


def code_lines(text: str) -> list[str]:
    """Lines of the blocks that are indented by four, or between fences named sh."""
    lines, fenced = [], None
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = line.removeprefix("```").strip() if fenced is None else None
        elif fenced == "sh" or (fenced is None and line.startswith("    ")):
            lines.append(line.strip())
    return lines
