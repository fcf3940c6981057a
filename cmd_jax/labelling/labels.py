"""What experts said: `labels.csv` as the page saves it, and the history of all that was ever said, which only grows.

A labels.csv has the columns `file` and `class`, and, as the page writes it, `state` and `group`. A row with a class names an
image. Of the other states "struck" means that it is no picture of any class, "open" that an earlier name is taken back. All
other rows say nothing; the page keeps the arrangement of its groups in them.
"""

import csv
import hashlib
import io
import os
from typing import NamedTuple

from cmd_jax import files
from cmd_jax.errors import DatasetError
from cmd_jax.text import printable

NAMED, STRUCK, OPEN = "named", "struck", "open"
STATES = (NAMED, STRUCK, OPEN)
COLUMNS = ("file", "class", "state", "source")


class Statement(NamedTuple):
    """One thing an expert said.

    Attributes:
        file: of the image, relative to the folder.
        name: of its class; "" unless `state` is "named".
        state: one of STATES.
        source: name and digest of the labels.csv that said it first.
    """

    file: str
    name: str
    state: str
    source: str


class Conflict(NamedTuple):
    """An image of which two things were said; the later one counts."""

    file: str
    before: str
    after: str


def read_labels(path: str) -> list[Statement]:
    """Reads what a labels.csv says.

    Raises:
        DatasetError: it is missing, no text, has no columns `file` and `class`, or a state that is none.
    """
    if not os.path.isfile(path):
        raise DatasetError(f"{path} does not exist; save it in the page with the button Save labels.csv")
    source = f"{printable(os.path.basename(path))} {hashlib.sha256(files.read_bytes(path)).hexdigest()[:8]}"
    found = []
    for number, row in _table(path, ("file", "class")):
        name, state = row["class"].strip(), (row.get("state") or "").strip()
        if state not in ("", *STATES):
            raise DatasetError(f"{path}, line {number}: state {state!r} is none of {', '.join(STATES)}, or empty; correct it")
        if name and state in ("", NAMED):
            found.append(Statement(row["file"], name, NAMED, source))
        elif state in (STRUCK, OPEN):
            found.append(Statement(row["file"], "", state, source))
    return found


def read_history(path: str) -> list[Statement]:
    """Reads a history; one that is not there yet has nothing. Raises DatasetError where it is damaged."""
    if not os.path.exists(path):
        return []
    return [Statement(*(row[column] for column in COLUMNS)) for _, row in _table(path, COLUMNS)]


def write_history(path: str, history: list[Statement]) -> None:
    """Writes a history, whole or not at all."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([COLUMNS, *history])
    files.write(path, out.getvalue())


def add(history: list[Statement], said: list[Statement]) -> tuple[list[Statement], list[Conflict]]:
    """Adds what one labels.csv says: (the longer history, what differs from what was said before).

    What is known already is not added again, and a file that was added before adds nothing: its statements are in the history,
    where later ones may have replaced them.
    """
    if {statement.source for statement in said} <= {statement.source for statement in history}:
        return history, []
    latest, added, conflicts = current(history), [], []
    for statement in said:
        before = latest.get(statement.file)
        if before is not None and before[1:3] == statement[1:3]:
            continue
        if before is None and statement.state == OPEN:
            continue
        if before is not None and before.state != OPEN:
            conflicts.append(Conflict(statement.file, spoken(before), spoken(statement)))
        added.append(statement)
        latest[statement.file] = statement
    return history + added, conflicts


def current(history: list[Statement]) -> dict[str, Statement]:
    """The last statement about each image."""
    return {statement.file: statement for statement in history}


def all_conflicts(history: list[Statement]) -> list[Conflict]:
    """All places of a history where a statement differs from the one before about the same image."""
    latest, found = {}, []
    for statement in history:
        before = latest.get(statement.file)
        if before is not None and before.state != OPEN and before[1:3] != statement[1:3]:
            found.append(Conflict(statement.file, spoken(before), spoken(statement)))
        latest[statement.file] = statement
    return found


def spoken(statement: Statement) -> str:
    """What a statement says, in a word."""
    return statement.name if statement.state == NAMED else f"({statement.state})"


def _table(path: str, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """(line, row) of each row of a table that has some columns."""
    try:
        text = files.read_bytes(path).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise DatasetError(f"{path} has no column {missing[0]}; it needs {', '.join(columns)} in its first line")
        found = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path} is no table of comma-separated values in UTF-8 ({error}); save it again") from error
    for number, row in found:
        if any(row[column] is None for column in columns) or not row["file"]:
            raise DatasetError(f"{path}, line {number}: a file or a class is missing; correct the line, or save it again")
    return found
