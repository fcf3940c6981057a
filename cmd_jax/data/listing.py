"""Lists the image files of a folder, as training, evaluation and embedding read it, and reads one of them."""

import os
import stat
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from cmd_jax.data.decode import IMAGE_SUFFIXES
from cmd_jax.errors import BadImage, DatasetError
from cmd_jax.text import printable

MAX_FILE_BYTES = 256 * 2**20  # no image of decode.MAX_PIXELS comes near

# Files that nobody expects to be read as images; all other files that are not read are counted for the user.
_NO_IMAGES = frozenset(
    f".{ending}"
    for ending in (
        *("txt", "md", "rst", "csv", "tsv", "json", "jsonl", "xml", "yaml", "yml", "toml", "ini", "cfg", "html", "htm", "pdf"),
        *("log", "db", "sha256", "md5", "lock", "partial", "py", "ipynb", "sh", "npy", "npz", "mat", "pkl", "h5", "hdf5"),
        *("parquet", "arrow", "safetensors", "zip", "tar", "gz", "tgz", "bz2", "xz", "7z", "rar"),
    )
)
# Folders that cameras, desktops and network storage make beside images; those that begin with a dot need no entry.
_SYSTEM_FOLDERS = frozenset(
    ("@eadir", "#recycle", "@recycle", "#snapshot", "__macosx", "$recycle.bin", "system volume information", "lost+found")
)
# Folders known by what they hold: what this project writes, and Android's sign that images are for no gallery.
_MARKS = {
    "run": {"config.json", "checkpoints"},
    "report": {"mil_overlays.png"},
    "prepared dataset": {"dataset_info.json", "features.json"},
    "with .nomedia": {".nomedia"},
}
_ALL_MARKS = frozenset().union(*_MARKS.values())
_RUN_FOLDERS = frozenset(("checkpoints", "eval", "report", "tb"))  # left out where the run lies in the folder itself
_SHOWN = 6  # endings or names in a note


class Listing(NamedTuple):
    """The images of a folder, and what was left out.

    Attributes:
        paths: of the images, relative to the folder, sorted.
        folders: all folders below it that were searched, relative to it, sorted.
        unread: ending -> number of files that are not read, without those that are certainly no images.
        skipped: name or kind -> number of folders that were left out.
    """

    paths: list[str]
    folders: list[str]
    unread: Counter[str]
    skipped: Counter[str]

    def note(self) -> str:
        """What was not read, for people; "" where all was."""
        kinds = (("not read", "file", self.unread), ("left out", "folder", self.skipped))
        return "; ".join(f"{what}: {_counts(noun, counter)}" for what, noun, counter in kinds if counter)


def _counts(noun: str, counter: Counter[str]) -> str:
    total = counter.total()
    ordered = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{count:,} {printable(name)}" for name, count in ordered[:_SHOWN])
    return f"{total:,} {noun}{'' if total == 1 else 's'} ({shown}{', ...' if len(ordered) > _SHOWN else ''})"


def find_images(folder: str, above: Iterable[str] = ()) -> Listing:
    """Lists the images below a folder at any depth.

    Left out are hidden files and folders (a name that begins with a dot), folders of thumbnails and of the system, folders that
    hold a file `.nomedia`, and what this project writes (runs, reports, prepared datasets). Linked folders are followed, and
    count under each name that they have; a link to a folder that it lies in ends there.

    Args:
        folder: is read whatever its own name is.
        above: folders that it lies in, to which links are not followed either.

    Raises:
        DatasetError: a folder cannot be read.
    """
    found = Listing([], [], Counter(), Counter())
    chain = frozenset(map(_identity, (folder, *above)))
    _add(folder, "", read_directory(folder), chain, found)
    found.paths.sort()
    found.folders.sort()
    return found


class _Content(NamedTuple):
    """Names of what lies directly in a folder."""

    folders: list[str]
    images: list[str]
    unread: Counter[str]  # endings
    marks: set[str]


def read_directory(folder: str) -> _Content:
    content = _Content([], [], Counter(), set())
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name in _ALL_MARKS:
                    content.marks.add(name)
                if _is_folder(entry):
                    content.folders.append(name)
                elif name.startswith("."):
                    continue
                elif name.lower().endswith(IMAGE_SUFFIXES):
                    content.images.append(name)
                else:
                    ending = os.path.splitext(name)[1].lower()
                    if ending not in _NO_IMAGES:
                        content.unread[ending or "without an ending"] += 1
    except OSError as error:
        raise _unreadable(error) from error
    return content


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder or a link to one; needs a system call for links alone."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _add(folder: str, below: str, content: _Content, chain: frozenset[tuple[int, int]], found: Listing) -> None:
    """Adds what lies in and below a folder; `below` is its relative path with a separator at its end, "" of the first one."""
    found.paths.extend(f"{below}{name}" for name in content.images)
    found.unread.update(content.unread)
    of_run = _RUN_FOLDERS if _MARKS["run"] <= content.marks else ()
    for name in content.folders:
        if name in of_run:
            continue
        if name.startswith(".") or name.lower() in _SYSTEM_FOLDERS:
            found.skipped[name] += 1
            continue
        place = os.path.join(folder, name)
        identity = _identity(place)
        if identity in chain:
            continue
        inner = read_directory(place)
        kind = next((kind for kind, marks in _MARKS.items() if marks <= inner.marks), None)
        if kind:
            found.skipped[kind] += 1
            continue
        found.folders.append(f"{below}{name}")
        _add(place, f"{below}{name}{os.sep}", inner, chain | {identity}, found)


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _unreadable(error) from error
    return status.st_dev, status.st_ino


def _unreadable(error: OSError) -> DatasetError:
    return DatasetError(f"directory {error.filename} cannot be read ({error.strerror}); make it readable")


def read_image_file(path: str, name: str) -> bytes:
    """Reads an image file.

    Args:
        path: of the file.
        name: for the error message.

    Raises:
        BadImage: it is not a regular file, too large, or cannot be read.
    """
    try:
        # A named pipe would keep a plain open() waiting for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadImage(f"{name}: is not a regular file but a pipe, device or directory; remove it")
            if status.st_size > MAX_FILE_BYTES:
                raise BadImage(f"{name}: {status.st_size:,} bytes are over the limit of {MAX_FILE_BYTES:,}; remove it")
            return file.read()
    except OSError as error:
        raise BadImage(f"{name}: cannot be read ({error.strerror}); make it readable or remove it") from error
