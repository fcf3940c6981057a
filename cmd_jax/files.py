"""Small files of a work directory, on a disk or in a bucket (gs://BUCKET/RUN, which needs the extra `gcs`)."""

import importlib.util
import os

from etils import epath

NEEDS = {"gs": "gcsfs"}  # what etils reads and writes a scheme with


def is_remote(path: str) -> bool:
    """Whether a path is an address such as gs://BUCKET/RUN."""
    return "://" in path


def refusal(path: str) -> str | None:
    """Why an address cannot be a work directory, with a remedy; None if it can, or is a local path."""
    scheme, separator, _ = path.partition("://")
    if not separator:
        return None
    if scheme not in NEEDS:
        return f"{path} is no address that is known; use a local path or gs://BUCKET/DIR"
    if importlib.util.find_spec(NEEDS[scheme]) is None:
        return f"{path} needs {NEEDS[scheme]}, which is not installed; pip install '.[gcs]', or use a local path"
    return None


def exists(path: str) -> bool:
    """Whether there is a file or a directory; a directory of a bucket is there once a file is in it."""
    return epath.Path(path).exists()


def names(directory: str) -> list[str]:
    """Names of what lies in a directory, sorted; none where it is not there."""
    place = epath.Path(directory)
    return sorted(entry.name for entry in place.iterdir()) if place.exists() else []


def make_directory(path: str) -> None:
    """Makes a directory and its parents unless they are there; buckets need none."""
    if not is_remote(path):
        os.makedirs(path, exist_ok=True)


def read(path: str) -> str:
    """A text in UTF-8."""
    return epath.Path(path).read_text()


def write(path: str, content: str | bytes) -> None:
    """Writes a file, whole or not at all: readers see the old or the new one."""
    content = content.encode() if isinstance(content, str) else content
    if is_remote(path):  # an object appears when all of it has arrived
        epath.Path(path).write_bytes(content)
        return
    partial = f"{path}.partial"
    with open(partial, "wb") as file:
        file.write(content)
    os.replace(partial, path)


def remove(path: str) -> None:
    """Removes a file."""
    epath.Path(path).unlink()
