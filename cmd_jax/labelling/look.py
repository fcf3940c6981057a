"""What is wrong with a folder before anyone labels it: doubles, leakage, outliers, unreadable files, suspected mislabels."""

import csv
import hashlib
import io
import json
import os
from typing import NamedTuple

import numpy as np

from cmd_jax import files
from cmd_jax.labelling.doubles import find_doubles
from cmd_jax.labelling.features import nearest
from cmd_jax.labelling.mislabels import find_mislabels
from cmd_jax.labelling.photos import Photos
from cmd_jax.text import printable

CROWD = 0.1  # of the images: how many of the nearest an outlier is unlike
DEVIATIONS = 3.5  # robust ones that an outlier's similarity lies below the median (Iglewicz and Hoaglin, 1993)
VERSION = 1  # of what `look` makes of the same photographs
KINDS = ("unreadable", "exact double", "near double", "outlier", "suspected mislabel")


class Finding(NamedTuple):
    """One thing to look at.

    Attributes:
        kind: one of KINDS.
        file: the photograph, relative to the folder.
        other: its double; "" where there is none.
        note: what was found, for people.
    """

    kind: str
    file: str
    other: str
    note: str


class Looked(NamedTuple):
    """What was found, and in lines for people."""

    findings: list[Finding]
    lines: list[str]


def look_again(photos: Photos, path: str) -> Looked:
    """`look`, or what an earlier call kept in a file: labels change nothing of it, photographs and class folders do."""
    of = _digest(photos)
    if os.path.exists(path):
        try:
            kept = json.loads(files.read(path))
            if kept["of"] == of:
                return Looked([Finding(*finding) for finding in kept["findings"]], kept["lines"])
        except (ValueError, TypeError, LookupError):  # damaged
            pass
    looked = look(photos)
    files.write(path, json.dumps({"of": of, **looked._asdict()}))
    return looked


def _digest(photos: Photos) -> str:
    """Of all that `look` reads, 64 hexadecimal digits."""
    files_of = [thumb.digest for thumb in photos.thumbs]
    told = [VERSION, photos.paths, files_of, photos.classes.tolist(), photos.splits.tolist(), photos.bad, photos.note]
    return hashlib.sha256(json.dumps(told).encode() + photos.features.tobytes()).hexdigest()


def look(photos: Photos) -> Looked:
    """Looks for all of KINDS."""
    findings = [Finding("unreadable", path, "", printable(reason)) for path, reason in photos.bad]
    doubles = _doubles(photos)
    outliers = _outliers(photos)
    mislabels, measured = _mislabels(photos)
    findings += doubles + outliers + mislabels
    across = sum("train and test" in finding.note for finding in doubles)
    count = lambda kind: sum(finding.kind == kind for finding in findings)
    lines = [
        f"{len(photos.paths):,} photographs, {count('unreadable'):,} cannot be read",
        f"doubles: {count('exact double'):,} exact, {count('near double'):,} near pairs; {across:,} across train and test",
        f"outliers: {count('outlier'):,}",
    ]
    if photos.note:
        lines.append(f"class folders are not used: {photos.note}")
    return Looked(findings, lines + measured)


def _doubles(photos: Photos) -> list[Finding]:
    digests = [thumb.digest for thumb in photos.thumbs]
    first: dict[str, int] = {}
    exact = [(first[digest], row) for row, digest in enumerate(digests) if first.setdefault(digest, row) != row]
    looks = [thumb.look for thumb in photos.thumbs]
    grey, colours = (np.stack([getattr(seen, name) for seen in looks]) for name in ("grey", "colours"))
    near = [found for found in find_doubles(photos.features, grey, colours) if digests[found.one] != digests[found.other]]
    findings = [_pair(photos, "exact double", one, row, "equal files") for one, row in exact]
    return findings + [
        _pair(photos, "near double", found.one, found.other, f"fine detail agrees to {found.detail:.2f}") for found in near
    ]


def _pair(photos: Photos, kind: str, one: int, other: int, said: str) -> Finding:
    splits = {photos.splits[one], photos.splits[other]}
    across = "; across train and test" if splits == {"train", "test"} else ""
    classes = "; of two classes" if photos.classes[one] != photos.classes[other] else ""
    return Finding(kind, photos.paths[other], photos.paths[one], f"{said}{across}{classes}")


def _outliers(photos: Photos) -> list[Finding]:
    similarity = crowd_similarity(photos.features)
    middle = np.median(similarity)
    deviation = 1.4826 * np.median(np.abs(similarity - middle))
    rows = np.nonzero(similarity < middle - DEVIATIONS * deviation)[0]
    note = f"similarity {{:.2f}} to the {100 * CROWD:.0f} % of the images that are nearest, of most images {{:.2f}}"
    rows = rows[np.argsort(similarity[rows])]
    return [Finding("outlier", photos.paths[row], "", note.format(similarity[row], middle)) for row in rows]


def crowd_similarity(features: np.ndarray) -> np.ndarray:
    """Mean cosine of each image to the share CROWD of the others that is nearest: [N, F] of unit norm -> [N].

    So many that images of another subject, which are each other's nearest, do not hide one another.
    """
    others = max(1, round(CROWD * (len(features) - 1)))
    _, similarity = nearest(features, others + 1)
    return (similarity.sum(axis=1, dtype=np.float64) - similarity.max(axis=1)) / others  # without itself


def _mislabels(photos: Photos) -> tuple[list[Finding], list[str]]:
    rows = np.nonzero(photos.classes != "")[0]
    if not len(rows):
        return [], []
    found = find_mislabels(photos.features[rows], photos.classes[rows])
    note = "is in {}, looks like {} (probability of its class {:.1g})"
    findings = [
        Finding("suspected mislabel", photos.paths[rows[row]], "", note.format(photos.classes[rows[row]], other, value))
        for row, other, value in zip(found.rows, found.other, found.probability, strict=True)
    ]
    measured = (
        f"suspected mislabels: {len(findings):,}; of 5 % planted errors this threshold finds {100 * found.recall:.0f} %, and "
        f"{100 * found.precision:.0f} % of what it finds was planted"
    )
    return findings, [measured]


def to_csv(findings: list[Finding]) -> str:
    """The findings as a table: kind, file, other, note."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([Finding._fields, *findings])
    return out.getvalue()
