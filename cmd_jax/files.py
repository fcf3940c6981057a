"""Small files of a work directory, on a disk or in a bucket (gs://BUCKET/RUN, which needs the extra `gcs`)."""

import contextlib
import importlib.util
import os
import secrets

from etils import epath
from etils.epath import backend

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
        return f"{path} is not a known kind of address; use a local path or gs://BUCKET/DIR"
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
    return read_bytes(path).decode()


def read_bytes(path: str) -> bytes:
    """The bytes that a file holds now; of an object in a bucket never those of a cached listing."""
    return backend.fsspec_backend.fs(path).cat_file(path) if is_remote(path) else epath.Path(path).read_bytes()


def write(path: str, content: str | bytes) -> None:
    """Writes a file, whole or not at all: readers see the old or the new one, also while several processes write it."""
    content = content.encode() if isinstance(content, str) else content
    if is_remote(path):  # an object appears when all of it has arrived
        epath.Path(path).write_bytes(content)
        return
    partial = f"{path}.{secrets.token_hex(4)}.partial"
    try:
        with open(partial, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise


def create(path: str, content: str) -> None:
    """Writes a file that does not exist yet; of several processes on any hosts, one succeeds.

    Raises:
        FileExistsError: it exists.
    """
    if is_remote(path):  # gcsfs asks for generation 0 of the object, which the bucket grants once
        backend.fsspec_backend.fs(path).pipe_file(path, content.encode(), mode="create")
        return
    with open(path, "xb") as file:  # O_EXCL, atomic on NFS too
        file.write(content.encode())


def remove(path: str) -> None:
    """Removes a file."""
    epath.Path(path).unlink()
