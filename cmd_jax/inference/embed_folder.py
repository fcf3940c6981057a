"""A folder of images -> one file of features: in batches, in parts that outlive an interruption, without bad images."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cmd_jax import __version__, files
from cmd_jax.errors import BadImage, ConfigError, DatasetError
from cmd_jax.inference import store
from cmd_jax.inference.load import Trained
from cmd_jax.inference.preprocess import file_crop, folder_images, in_threads
from cmd_jax.inference.run import Encoder, check_finite, grid_side, joined, place, widths
from cmd_jax.inference.store import Meta
from cmd_jax.progress import Progress
from cmd_jax.text import printable

PART_IMAGES = 1024
PART_BYTES = 2**27
MAX_BAD_SHARE = 0.5  # more: most likely the wrong folder
JOB = "job.json"


class Summary(NamedTuple):
    """What became of a folder.

    Attributes:
        images: in the file.
        bad: left out; listed in `bad_list`.
        computed: images that this call has encoded, the others were there.
        bad_list: path of the list, or None.
        note: what of the folder was not read as an image, for people; "" where all was.
    """

    images: int
    bad: int
    computed: int
    bad_list: str | None
    note: str = ""


def embed_folder(
    trained: Trained, folder: str, out: str, batch_size: int = 64, patches: bool = False, patch_weights: bool = False
) -> Summary:
    """Writes the features of all images below a folder, sorted by path.

    Parts are kept in `OUT.partial/` until the file is whole; the same call goes on from them. Bad images are left out and
    listed in `OUT.bad.txt` with the reason.

    Args:
        trained: the network.
        folder: with images at any depth.
        out: a local path that ends in .parquet or .npz.
        batch_size: images that are encoded at a time.
        patches: write patch tokens and MIL weights too.
        patch_weights: write how much each patch counts, where the network says it; see `read_outputs`.

    Raises:
        ConfigError: a path that cannot be, or `out` is of another network, folder or options.
        DatasetError: more than half of the images are bad; nothing but the list is written.
    """
    _check_out(out)
    listing = folder_images(folder)
    paths, note = listing.paths, listing.note()
    shapes = widths(trained.config, trained.params)
    columns = ["features"]
    if patches:
        columns += ["patch_tokens", *(["mil_weights"] if trained.has_scorer else [])]
    if patch_weights and "patch_weights" in shapes:
        columns.append("patch_weights")
    flat = {name: int(np.prod(shapes[name])) for name in columns}
    job = _job(trained, folder, paths, {"batch_size": batch_size, "columns": columns})
    if os.path.exists(out):
        return _finished(out, job, note)
    directory = f"{out}.partial"
    _open_parts(directory, job)
    row_bytes = sum(width * np.dtype(store.DTYPES[name]).itemsize for name, width in flat.items())
    size = max(1, min(PART_IMAGES, PART_BYTES // row_bytes) // batch_size) * batch_size
    parts = [os.path.join(directory, f"{number:06d}.parquet") for number in range(-(-len(paths) // size))]
    chunks = [paths[start : start + size] for start in range(0, len(paths), size)]
    computed = _write_parts(trained, folder, columns, batch_size, parts, chunks)
    bad = [line for part in parts for line in files.read(f"{part}.bad").splitlines()]
    bad_list = _list_bad(out, bad)
    if len(bad) > MAX_BAD_SHARE * len(paths):
        shutil.rmtree(directory)
        raise DatasetError(
            f"{folder}: {len(bad):,} of {len(paths):,} images are bad, more than half; repair or remove "
            f"them, {bad_list} lists them with the reason"
        )
    meta = Meta(
        version=__version__,
        checkpoint=trained.source,
        step=trained.step,
        fingerprint=trained.fingerprint,
        job=_digest(job),
        features=trained.config.eval.features,
        crop_px=trained.config.eval.crop_px,
        grid=grid_side(trained.config),
        widths=flat,
        images=len(paths) - len(bad),
    )
    whole = os.path.join(directory, f"whole{os.path.splitext(out)[1]}")
    store.join_parts([part for part in parts if store.count_rows(part)], whole, meta)
    os.replace(whole, out)
    shutil.rmtree(directory)
    return Summary(meta.images, len(bad), computed, bad_list, note)


def _check_out(out: str) -> None:
    if not out.endswith(store.SUFFIXES):
        raise ConfigError(f"--out={out} must end in {' or '.join(store.SUFFIXES)}")
    if files.is_remote(out):
        raise ConfigError(f"--out={out} must be a local path, its parts are continued in place; copy the file when it is whole")
    if os.path.isdir(out):
        raise ConfigError(f"--out={out} is a directory; name a file in it")
    files.make_directory(os.path.dirname(os.path.abspath(out)))


def _job(trained: Trained, folder: str, paths: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """What decides the rows: each value alone, so that a message can say which differs."""
    digest = hashlib.sha256()
    for path in paths:
        status = os.stat(os.path.join(folder, path)) if os.path.exists(os.path.join(folder, path)) else None
        seen = (status.st_size, status.st_mtime_ns) if status else None  # a dangling link is a bad image, not a missing one
        digest.update(f"{path}\0{seen}\n".encode(errors="surrogateescape"))
    features = {"features": trained.config.eval.features}
    return {"checkpoint": trained.fingerprint, "images": digest.hexdigest()[:32], "options": features | options}


def _digest(job: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:32]


def _finished(out: str, job: dict[str, Any], note: str) -> Summary:
    meta = store.read_meta(out)
    if meta.job != _digest(job):
        what = "checkpoint" if meta.fingerprint != job["checkpoint"] else "images or options"
        raise ConfigError(f"--out={out} is there already, of another {what}; choose another path, or remove it")
    bad_list = f"{out}.bad.txt"
    bad = len(files.read(bad_list).splitlines()) if os.path.exists(bad_list) else 0
    return Summary(meta.images, bad, 0, bad_list if bad else None, note)


def _open_parts(parts: str, job: dict[str, Any]) -> None:
    """Makes the directory of the parts, or checks that what it holds is of this job."""
    path = os.path.join(parts, JOB)
    if os.path.exists(path):
        try:
            before = json.loads(files.read(path))
            differs = [key for key in job if before[key] != job[key]]
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{path} is damaged; remove {parts} to start over") from error
        if differs:
            raise ConfigError(
                f"{parts} holds parts of an interrupted run with another {' and other '.join(differs)}; remove it "
                "to start over, or go on as it was begun"
            )
        return
    files.make_directory(parts)
    files.write(path, json.dumps(job))


def _write_parts(
    trained: Trained, folder: str, columns: list[str], batch_size: int, parts: list[str], chunks: list[list[str]]
) -> int:
    """Writes the parts that are not there yet, each with the paths of its chunk; returns the number of images in them."""
    missing = [number for number, part in enumerate(parts) if not _is_whole(part)]
    images, todo = sum(map(len, chunks)), sum(len(chunks[number]) for number in missing)
    if not missing:
        return 0
    encoder = place(trained)
    progress = Progress(f"embedding {printable(folder)}", images, "images", images - todo)
    for number in missing:
        _write_part(parts[number], encoder, columns, folder, chunks[number], batch_size, progress)
    progress.close()
    return todo


def _is_whole(part: str) -> bool:
    return store.count_rows(part) is not None and os.path.exists(f"{part}.bad")


def _write_part(
    part: str, encoder: Encoder, columns: list[str], folder: str, paths: list[str], batch_size: int, progress: Progress
) -> None:
    """Writes the columns of the images that can be read, and beside them a line for each that cannot."""
    names, bad = [], []

    def load(path: str) -> np.ndarray | BadImage:
        try:
            return file_crop(os.path.join(folder, path), encoder.config)
        except BadImage as error:
            return error

    def crops() -> Iterator[np.ndarray]:
        for path, crop in zip(paths, in_threads(load, paths, encoder.config.data.decode_threads), strict=True):
            if isinstance(crop, BadImage):
                bad.append(f"{printable(path)}\t{printable(str(crop))}\n")
            else:
                names.append(path)
                yield crop
            progress.advance()

    pieces, first = [], 0
    for encoded in encoder.run(crops(), columns, batch_size):
        (count,) = {len(array) for array in encoded.values()}
        pieces.append(check_finite(encoded, names[first : first + count]))
        first += count
    files.write(f"{part}.bad", "".join(bad))
    whole = joined(pieces) if pieces else {}
    store.write_part(part, [_text(path) for path in names], {name: whole[name] for name in columns if whole})


def _list_bad(out: str, bad: list[str]) -> str | None:
    path = f"{out}.bad.txt"
    if bad:
        files.write(path, "".join(f"{line}\n" for line in bad))
        return path
    if os.path.exists(path):
        os.remove(path)
    return None


def _text(path: str) -> str:
    """A path as UTF-8 text; bytes that are none are spelled out."""
    return path.encode("utf-8", "backslashreplace").decode()
