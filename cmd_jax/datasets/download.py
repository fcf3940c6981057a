"""Downloads archives; an interrupted download resumes."""

import http.client
import os
import shutil
import urllib.error
import urllib.request

from cmd_jax.datasets import archives
from cmd_jax.datasets.archives import Archive
from cmd_jax.errors import DatasetError
from cmd_jax.progress import Progress

TIMEOUT_S = 60


def download(archive: Archive, directory: str) -> str:
    """Downloads an archive into a directory, compares it with its registered digest, and returns its path.

    Bytes gather in NAME.partial; the file gets its name when its digest is right.

    Raises:
        DatasetError: it cannot be fetched, the disk is too full, or it is another file.
    """
    os.makedirs(directory, exist_ok=True)
    path, partial = os.path.join(directory, archive.name), os.path.join(directory, f"{archive.name}.partial")
    have = os.path.getsize(partial) if os.path.exists(partial) else 0
    if archive.size is None or have < archive.size:
        try:
            _fetch(archive, partial, have)
        except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
            kept = os.path.getsize(partial) if os.path.exists(partial) else 0
            raise DatasetError(
                f"{archive.url} could not be fetched ({error}); {kept:,} bytes are kept in {partial}. Remedy: run again to go "
                f"on, or put {archive.name} from {archive.source} into {directory}"
            ) from error
    try:
        archives.check(partial, archive)
    except DatasetError:
        os.remove(partial)  # going on from it could never be right
        raise
    os.replace(partial, path)
    return path


def _fetch(archive: Archive, partial: str, have: int) -> None:
    headers = {"User-Agent": "cmd_jax"} | ({"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(urllib.request.Request(archive.url, headers=headers), timeout=TIMEOUT_S) as response:
        if have and response.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0  # the server does not go on in the middle
        total = have + int(response.headers["Content-Length"] or 0)
        free = shutil.disk_usage(os.path.dirname(partial)).free
        if total - have > free:
            raise OSError(f"{total - have:,} bytes are to come, the disk has {free:,} free")
        progress = Progress(f"download of {archive.name}", total, "bytes", have)
        with open(partial, "ab" if have else "wb") as file:
            while chunk := response.read(archives.CHUNK):
                file.write(chunk)
                progress.advance(len(chunk))
        progress.close()
    if os.path.getsize(partial) < total:
        raise OSError("the connection ended early")
