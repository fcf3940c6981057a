"""Image files in a folder: which formats are read, and the one listing that training, evaluation and `embed` share."""

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple, NoReturn

from PIL import features

from cmd_jax.errors import BadImage, DatasetError
from cmd_jax.text import printable

# Formats of Pillow that are read, with the endings of their files. Pillow reads AVIF from 11.3 on, if it was built with it.
ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
}
if "avif" in features.modules and features.check_module("avif"):
    ENDINGS["AVIF"] = (".avif",)
IMAGE_SUFFIXES = tuple(ending for endings in ENDINGS.values() for ending in endings)
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
    """What a folder holds.

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
        parts = []
        if self.unread:
            count = self.unread.total()
            parts.append(f"not read: {count:,} {'file' if count == 1 else 'files'} ({_counts(self.unread)})")
        if self.skipped:
            count = self.skipped.total()
            parts.append(f"left out: {count:,} {'folder' if count == 1 else 'folders'} ({_counts(self.skipped)})")
        return "; ".join(parts)


def _counts(counter: Counter[str]) -> str:
    ordered = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count:,} {printable(name)}" for name, count in ordered[:_SHOWN]]
    return ", ".join([*shown, "..."] if len(ordered) > _SHOWN else shown)


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
    _add(folder, "", _read(folder), chain, found)
    found.paths.sort()
    found.folders.sort()
    return found


class _Content(NamedTuple):
    """Names of what lies directly in a folder."""

    folders: list[str]
    images: list[str]
    unread: Counter[str]  # endings
    marks: set[str]


def _read(folder: str) -> _Content:
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
        _refuse(error)
    return content


def _is_folder(entry: os.DirEntry) -> bool:
    """Of a link, whether it leads to one; no system call for what is no link."""
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
        inner = _read(place)
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
        _refuse(error)
    return status.st_dev, status.st_ino


def _refuse(error: OSError) -> NoReturn:
    raise DatasetError(f"directory {error.filename} cannot be read ({error.strerror}); make it readable") from error


def subfolders(folder: str) -> list[str]:
    """Names of the folders directly in a folder, sorted; hidden ones are left out."""
    return sorted(name for name in _read(folder).folders if not name.startswith("."))


def ancestors(path: str) -> Iterator[str]:
    """The folders that a relative path lies in, the outermost first: a/b/c.jpg -> a, a/b."""
    for at, letter in enumerate(path):
        if letter == os.sep:
            yield path[:at]


def read_image_file(path: str, name: str) -> bytes:
    """The bytes of an image file.

    Args:
        path: of the file.
        name: for the error message.

    Raises:
        BadImage: it is no file, too large, or cannot be read.
    """
    try:
        # A named pipe would keep a plain open() waiting for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadImage(f"{name}: is no file but a pipe, device or directory; remove it")
            if status.st_size > MAX_FILE_BYTES:
                raise BadImage(f"{name}: {status.st_size:,} bytes are over the limit of {MAX_FILE_BYTES:,}; remove it")
            return file.read()
    except OSError as error:
        raise BadImage(f"{name}: cannot be read ({error.strerror}); make it readable or remove it") from error
