"""`manifest.sha256`: digests of files, written once and compared on request.

The format is that of `sha256sum`, so `sha256sum --check manifest.sha256` compares without this program. It is the only thing
that finds a flipped bit in a JPEG: nearly all of them decode without an error, to other pixels.
"""

import os
import re

from cmd_jax.datasets import archives
from cmd_jax.errors import DatasetError
from cmd_jax.files import write as write_file
from cmd_jax.text import printable

MANIFEST = "manifest.sha256"
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}


def write(directory: str, files: list[str], what: str) -> None:
    """Writes the manifest of files into the directory that they are in or below, whole or not at all.

    Args:
        directory: of the manifest; names in it are relative to this.
        files: paths.
        what: they are, for progress.

    Raises:
        DatasetError: the directory cannot be written to.
    """
    path = os.path.join(directory, MANIFEST)
    lines = [_line(name, digest) for name, digest in _digests(directory, files, what).items()]
    try:
        write_file(path, "".join(lines).encode("utf-8", "surrogateescape"))  # names of files may hold any bytes
    except OSError as error:
        raise DatasetError(f"{path} cannot be written ({error.strerror}); make the directory writable, or copy it") from error


def compare(directory: str, files: list[str], what: str, remedy: str) -> None:
    """Compares files with the manifest of their directory.

    Args:
        directory: as in `write`, as are files and what.
        remedy: what to do about a difference.

    Raises:
        DatasetError: a file is missing, new, or not what the manifest says; or the manifest is damaged.
    """
    wanted, found = _read(os.path.join(directory, MANIFEST)), _digests(directory, files, what)
    wrong = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
    if wrong:
        first = wrong[0]
        how = "is missing" if first not in found else "is new" if first not in wanted else "has changed"
        raise DatasetError(
            f"{directory}: {len(wrong)} of {len(wanted)} files are not what {MANIFEST} says, first {printable(first)} ({how}); "
            f"{remedy}"
        )


def exists(directory: str) -> bool:
    return os.path.exists(os.path.join(directory, MANIFEST))


def _digests(directory: str, files: list[str], what: str) -> dict[str, str]:
    """Name in the manifest -> sha256."""
    return {os.path.relpath(path, directory): digest for path, digest in archives.digests(files, what).items()}


def _line(name: str, digest: str) -> str:
    escaped = "".join(_ESCAPES.get(letter, letter) for letter in name)
    mark = "\\" if escaped != name else ""
    return f"{mark}{digest}  {escaped}\n"


def _read(path: str) -> dict[str, str]:
    """Name -> sha256."""
    letters = {escape: letter for letter, escape in _ESCAPES.items()}
    found = {}
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, 1):
            digest, gap, name = line.removesuffix("\n").partition("  ")
            if digest.startswith("\\"):
                digest, name = digest[1:], re.sub(r"\\.", lambda escape: letters.get(escape[0], escape[0]), name)
            if not (gap and name and re.fullmatch("[0-9a-f]{64}", digest)):
                raise DatasetError(
                    f"{path}: line {number} is not a digest and a name; restore the file, or remove it to start anew"
                )
            found[name] = digest
    return found
