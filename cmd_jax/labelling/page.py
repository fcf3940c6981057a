"""The page for the expert: one file, `index.html`, that names groups and saves labels.csv, without a network."""

import base64
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import quote

import numpy as np
from markupsafe import Markup

from cmd_jax import files, html
from cmd_jax.labelling.groups import Group, Tree
from cmd_jax.labelling.labels import Conflict
from cmd_jax.labelling.look import KINDS, Finding
from cmd_jax.labelling.photos import Photos
from cmd_jax.labelling.suggest import Suggestions

PACKAGE = "cmd_jax.labelling"
SHORTCUTS = (
    (("←", "→", "↑", "↓", "Home", "End"), "go to another image of the group"),
    (("N", "P"), "next group, previous group"),
    (("Enter",), "write the name of the group; Enter again says it, Escape leaves it"),
    (("X", "Space"), "select the image, or not"),
    (("A",), "select all images of the group, or none"),
    (("M",), "move the selected images, or this one, to a class or a group"),
    (("T",), "take them out, into a group of their own: not of this class, which is remembered"),
    (("S",), "strike them: pictures of no class; again: not struck"),
    (("D",), "divide the group in two, where its images differ most"),
    (("G",), "merge the whole group with a class or a group"),
    (("V",), "view the image large"),
    (("K",), "show key patches, or not: where the network looks most"),
    (("Z", "Y"), "undo, redo"),
    (("Ctrl S",), "save labels.csv"),
)


def write_page(
    path: str,
    photos: Photos,
    tree: Tree,
    groups: list[Group],
    names: np.ndarray,
    struck: np.ndarray,
    ruled_out: Mapping[int, Collection[str]],
    suggestions: Suggestions | None,
    findings: list[Finding],
    conflicts: list[Conflict],
) -> None:
    """Writes the page, whole or not at all.

    Args:
        path: of the file.
        photos: N of them.
        tree: of all of them.
        groups: of those that are neither named nor struck.
        names: [N] texts that experts gave; "" where there is none.
        struck: [N] bool, pictures of no class.
        ruled_out: names that images are not of, by row.
        suggestions: for all of them; None where nothing is named.
        findings: of the first look.
        conflicts: images that were called otherwise before.
    """
    data = _data(photos, tree, groups, names, struck, ruled_out, suggestions, findings, conflicts)
    data["id"] = hashlib.sha256(json.dumps([data[key] for key in ("files", "groups", "struck")]).encode()).hexdigest()[:16]
    data["base"] = quote(os.path.relpath(photos.folder, os.path.dirname(os.path.abspath(path))).replace(os.sep, "/")) + "/"
    counts = [(kind, sum(finding.kind == kind for finding in findings)) for kind in KINDS]
    script = html.resource(PACKAGE, "label.js")
    page = (
        html.environment(PACKAGE)
        .get_template("label.html")
        .render(
            folder=os.path.basename(os.path.abspath(photos.folder)),
            count=len(photos.paths),
            kinds=[(kind, number) for kind, number in counts if number],
            shortcuts=SHORTCUTS,
            data=data,
            thumbs=[base64.b64encode(thumb.webp).decode() for thumb in photos.thumbs],
            style=Markup(html.resource(PACKAGE, "label.css")),
            script=Markup(script),
            digest=Markup(html.script_digest(script)),
        )
    )
    files.write(path, page)


def _data(
    photos: Photos,
    tree: Tree,
    groups: list[Group],
    names: np.ndarray,
    struck: np.ndarray,
    ruled_out: Mapping[int, Collection[str]],
    suggestions: Suggestions | None,
    findings: list[Finding],
    conflicts: list[Conflict],
) -> dict[str, Any]:
    """What the script reads."""
    place = np.zeros(len(photos.paths), np.int64)
    place[tree.order] = np.arange(len(place))
    known = sorted(set(names[names != ""]))
    shown = [{"images": group.rows.tolist(), "name": "", "suggested": group.name} for group in groups]
    for name in known:
        shown.append({"images": np.nonzero(names == name)[0].tolist(), "name": name, "suggested": ""})
    if struck.any():
        shown.append({"images": np.nonzero(struck)[0].tolist(), "name": "", "suggested": ""})
    row_of = {path: row for row, path in enumerate(photos.paths)}
    flags: dict[int, list[str]] = {}
    for kind, file, other, note in findings:
        for path in filter(None, (file, other)):
            if path in row_of:
                flags.setdefault(row_of[path], []).append(f"{kind}: {note}")
    for file, before, after in conflicts:
        if file in row_of:
            flags.setdefault(row_of[file], []).append(f"conflict: {before} before, then {after}")
    return {
        "files": photos.paths,
        "sizes": [thumb.size for thumb in photos.thumbs],
        "marks": [_marks(marks) for marks in photos.marks],
        "place": place.tolist(),
        "heights": np.argsort(np.argsort(tree.heights, kind="stable"), kind="stable").tolist(),
        "groups": shown,
        "struck": np.nonzero(struck)[0].tolist(),
        "ruled_out": {row: sorted(names) for row, names in ruled_out.items()},
        "probability": None if suggestions is None else np.round(suggestions.probability, 4).tolist(),
        "names": known,
        "flags": flags,
        "findings": [
            {"kind": kind, "image": row_of.get(file, -1), "other": row_of.get(other, -1), "file": file, "note": note}
            for kind, file, other, note in findings
        ],
    }


def _marks(marks: np.ndarray) -> list[list[int]]:
    """[K, 4] fractions -> those that there are, in thousandths."""
    return np.round(1000 * marks[marks[:, 2] > 0]).astype(int).tolist()
