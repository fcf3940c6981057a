"""What experts said: `labels.csv` as the page saves it, and the history of all that was ever said, which only grows.

A labels.csv has the columns `file` and `class`, and, as the page writes it, `state` and `group`. A row with a class names an
image. Of the other states "struck" means that it is no picture of any class, "not" that it is not of the class of the row (an
image can have several such rows), "open" that an earlier name is taken back. All other rows say nothing; the page keeps the
arrangement of its groups in them.
"""

import csv
import hashlib
import io
import os
from typing import NamedTuple

from cmd_jax import files
from cmd_jax.errors import DatasetError
from cmd_jax.text import printable

NAMED, STRUCK, NOT, OPEN = "named", "struck", "not", "open"
STATES = (NAMED, STRUCK, NOT, OPEN)
COLUMNS = ("file", "class", "state", "source")


class Statement(NamedTuple):
    """One thing an expert said.

    Attributes:
        file: of the image, relative to the folder.
        name: of the class that it is of or is not of; "" where `state` is "struck" or "open".
        state: one of STATES.
        source: name and digest of the labels.csv that said it first.
    """

    file: str
    name: str
    state: str
    source: str


class Said(NamedTuple):
    """All that holds of one image after some statements about it.

    Attributes:
        name: of its class; "" unless `state` is "named".
        state: "named", "struck" or "open".
        ruled_out: classes that it is not of.
    """

    name: str = ""
    state: str = OPEN
    ruled_out: frozenset[str] = frozenset()


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
        if state == NOT and not name:
            raise DatasetError(f"{path}, line {number}: state 'not' names no class; write the one that the image is not of")
        if name and state in ("", NAMED, NOT):
            found.append(Statement(row["file"], name, state or NAMED, source))
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
        before = latest.get(statement.file, Said())
        if _then(before, statement) == before:
            continue
        conflicts += _conflict(before, statement)
        added.append(statement)
        latest[statement.file] = _then(before, statement)
    return history + added, conflicts


def current(history: list[Statement]) -> dict[str, Said]:
    """What holds of each image that was spoken of."""
    latest: dict[str, Said] = {}
    for statement in history:
        latest[statement.file] = _then(latest.get(statement.file, Said()), statement)
    return latest


def all_conflicts(history: list[Statement]) -> list[Conflict]:
    """All places of a history where a statement contradicts what held of its image."""
    latest, found = {}, []
    for statement in history:
        before = latest.get(statement.file, Said())
        found += _conflict(before, statement)
        latest[statement.file] = _then(before, statement)
    return found


def _then(before: Said, statement: Statement) -> Said:
    """What holds of an image after one more statement: it counts where it contradicts those before."""
    if statement.state != NOT:
        return Said(statement.name, statement.state, before.ruled_out - {statement.name})
    name, state = ("", OPEN) if statement.name == before.name else before[:2]
    return Said(name, state, before.ruled_out | {statement.name})


def _conflict(before: Said, statement: Statement) -> list[Conflict]:
    """The contradiction of a statement to what held of its image, if it is one."""
    _, name, state, _ = statement
    if state == NOT:
        denied = name if name == before.name else ""
    elif name in before.ruled_out:
        denied = f"(not {name})"
    else:
        denied = "" if before.state == OPEN or before[:2] == (name, state) else before.name or f"({before.state})"
    after = {NAMED: name, NOT: f"(not {name})"}.get(state, f"({state})")
    return [Conflict(statement.file, denied, after)] if denied else []


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
