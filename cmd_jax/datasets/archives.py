"""Archives of published datasets: their sources and digests, and reading them without unpacking anything to disk."""

import gzip
import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from cmd_jax.errors import DatasetError
from cmd_jax.progress import Progress

CHUNK = 1 << 20
MAX_MEMBER_BYTES = 256 * 2**20  # no image or table of these archives comes near
MAX_TOTAL_BYTES = 64 * 2**30  # NABirds, the largest, unpacks to 10 GB
MAX_MEMBERS = 1_000_000  # NABirds has 49,000
MAX_RATIO = 20  # of unpacked to packed bytes; images are packed already, tables to a fifth
RATIO_FREE_BYTES = 64 * 2**20  # that a small archive of tables may unpack to, whatever the ratio
HEADER_BYTES = 2**20  # between two members


class Archive(NamedTuple):
    """A file of a published dataset.

    Attributes:
        name: of the file.
        source: page or words that lead to it, for people.
        url: where a program can fetch it; None where the source has none or is dead.
        size: in bytes; None where it is not known.
        sha256: None where it is not known.
        md5: the publisher's, where there is no sha256.
    """

    name: str
    source: str
    url: str | None = None
    size: int | None = None
    sha256: str | None = None
    md5: str | None = None


def locate(directory: str, layouts: tuple[tuple[Archive, ...], ...], prepare_name: str) -> dict[str, str]:
    """Finds the first layout whose files are all there: paths by name.

    Args:
        directory: the manual directory.
        layouts: sets of files that each hold the whole dataset.
        prepare_name: what `cmd_jax.prepare` calls the dataset.

    Raises:
        DatasetError: naming what is missing of the first layout, where to get it and where to put it.
    """
    for layout in layouts:
        paths = {archive.name: os.path.join(directory, archive.name) for archive in layout}
        if all(map(os.path.exists, paths.values())):
            return paths
    missing = [archive for archive in layouts[0] if not os.path.exists(os.path.join(directory, archive.name))]
    sources = dict.fromkeys(archive.source for archive in missing)
    files = {source: " and ".join(archive.name for archive in missing if archive.source == source) for source in sources}
    wanted = "; ".join(f"{names} from {source}" for source, names in files.items())
    others = "".join(f", or instead {' and '.join(archive.name for archive in layout)}" for layout in layouts[1:])
    fetch = f"python -m cmd_jax.prepare {prepare_name} downloads it, or " if all(archive.url for archive in missing) else ""
    raise DatasetError(
        f"{directory} lacks {wanted}{others}. Remedy: {fetch}put it there unchanged, "
        "or name its directory (--manual_dir=DIR of cmd_jax.prepare, --config.data.manual_dir=DIR of cmd_jax.main)"
    )


class _Unpacked:
    """Decompresses a gzipped file for tarfile, with limits on the output.

    tarfile keeps headers of any length in memory, so what comes between two members is limited too.
    """

    def __init__(self, packed: BinaryIO):
        self._packed, self._stream = packed, gzip.GzipFile(fileobj=packed)
        self._total, self._until = 0, MAX_MEMBER_BYTES + HEADER_BYTES

    def next_member(self) -> None:
        """Sets the limit of the member that begins here."""
        self._until = self._total + MAX_MEMBER_BYTES + HEADER_BYTES

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self._total += len(content)
        if self._total > min(self._until, MAX_TOTAL_BYTES):
            raise tarfile.ReadError(f"over {min(self._until, MAX_TOTAL_BYTES):,} bytes come out of it")
        if self._total > RATIO_FREE_BYTES + MAX_RATIO * self._packed.tell():
            raise tarfile.ReadError(f"it unpacks to over {MAX_RATIO} times its size, as no archive of images does")
        return content


def members(path: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yields names and contents of the wanted files of a gzipped tar, in its order.

    Nothing is written. Plain files are read; links that stay inside are passed over. What Python's "data" filter of
    extraction refuses (a name or link that leads out, a device), an absolute name, and sizes beyond the limits above end in
    an error.

    Args:
        path: of the archive.
        wanted: says of a name, without a leading "./", whether it is read.

    Raises:
        DatasetError: the file is not a gzipped tar, is damaged, or breaks a rule above.
    """
    try:
        with open(path, "rb") as packed:
            unpacked = _Unpacked(packed)
            with tarfile.open(fileobj=unpacked, mode="r|") as tar:
                for count, member in enumerate(tar, 1):
                    unpacked.next_member()
                    _check_member(path, member, count)
                    name = member.name.removeprefix("./")
                    if member.isreg() and wanted(name):
                        yield name, tar.extractfile(member).read()
    except DatasetError:
        raise
    # Damaged headers raise many types (OverflowError, UnicodeDecodeError, ...); all of them mean the same here.
    except Exception as error:
        reason = f"{error or type(error).__name__}"
        raise DatasetError(f"{path} cannot be read ({reason}); download the archive again") from error


def _check_member(path: str, member: tarfile.TarInfo, count: int) -> None:
    try:
        if os.path.isabs(member.name):
            raise tarfile.AbsolutePathError(member)
        tarfile.data_filter(member, os.curdir)
    except tarfile.FilterError as error:
        raise DatasetError(f"{path} holds an unsafe member: {error}; it is not the genuine archive") from error
    if member.size > MAX_MEMBER_BYTES or count > MAX_MEMBERS:
        raise DatasetError(
            f"{path}: {member.name} takes {member.size:,} bytes and is member {count:,}; the limits are {MAX_MEMBER_BYTES:,} "
            f"and {MAX_MEMBERS:,}; it is not the genuine archive"
        )


def read_all(path: str, names: set[str]) -> dict[str, bytes]:
    """Reads the named members, and stops at the last of them.

    Raises:
        DatasetError: one is missing.
    """
    found: dict[str, bytes] = {}
    for name, content in members(path, names.__contains__):
        found[name] = content
        if len(found) == len(names):
            break
    missing = sorted(names - set(found))
    if missing:
        raise DatasetError(f"{path} lacks {', '.join(missing)}; it is another archive, or damaged: download it again")
    return found


def images(path: str, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    """Yields members that must all be there, in the archive's order.

    Raises:
        DatasetError: one comes twice, or at the end, when some did not come.
    """
    left = set(wanted)
    for name, content in members(path, wanted.__contains__):
        if name not in left:
            raise DatasetError(f"{path} holds {name} twice; it is not the genuine archive")
        left.remove(name)
        yield name, content
    if left:
        raise DatasetError(f"{path} lacks {len(left):,} images, first {min(left)}; download the archive again")


def digests(paths: list[str], what: str, algorithm: str = "sha256") -> dict[str, str]:
    """Computes hexadecimal digests of files by path, with progress under the name `what`."""
    progress, found = Progress(f"{algorithm} of {what}", sum(map(os.path.getsize, paths)), "bytes"), {}
    for path in paths:
        hasher = hashlib.new(algorithm)
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                hasher.update(chunk)
                progress.advance(len(chunk))
        found[path] = hasher.hexdigest()
    progress.close()
    return found


def check(path: str, archive: Archive) -> str:
    """Compares a file with its registered size and digest, and returns its sha256.

    Raises:
        DatasetError: it is another file.
    """
    size = os.path.getsize(path)
    if archive.size is not None and size != archive.size:
        raise DatasetError(
            f"{path} has {size:,} bytes, the genuine {archive.name} has {archive.size:,}; "
            f"download it again from {archive.source}"
        )
    sha256 = digests([path], archive.name)[path]
    algorithm, wanted = ("sha256", archive.sha256) if archive.sha256 else ("md5", archive.md5)
    if wanted:
        found = sha256 if algorithm == "sha256" else digests([path], archive.name, algorithm)[path]
        if found != wanted:
            raise DatasetError(
                f"{path} has {algorithm} {found}, the genuine {archive.name} has {wanted}; "
                f"download it again from {archive.source}"
            )
    return sha256
