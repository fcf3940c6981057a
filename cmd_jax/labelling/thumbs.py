"""What labelling keeps of the pixels of photographs: a thumbnail, and what doubles are found by; also in a file.

A further round reads only photographs that have changed. The file is Parquet, a row a photograph, in any order.
"""

import hashlib
import io
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cmd_jax import files
from cmd_jax.data.decode import decode_rgb
from cmd_jax.data.listing import read_image_file
from cmd_jax.labelling.doubles import COARSE, SIDE, Look, look_of
from cmd_jax.text import printable

PAGE_BYTES = 40e6  # of all thumbnails: what a browser opens from disk within a second or two
THUMB_PX = (96, 256)  # least and most of the longer side
BYTES_PER_PIXEL = 0.28  # of a thumbnail
QUALITY = 70
VERSION = 1  # of what `read_thumb` makes of the same file
_COLUMNS = {
    "path": pa.string(),
    "made_of": pa.list_(pa.field("element", pa.int64(), nullable=False), 3),
    "webp": pa.binary(),
    "size": pa.list_(pa.field("element", pa.int64(), nullable=False), 2),
    "digest": pa.string(),
    "grey": pa.binary(SIDE * SIDE),
    "colours": pa.binary(COARSE * COARSE * 3),
}
_FIELDS = [pa.field(name, kind, nullable=False) for name, kind in _COLUMNS.items()]
SCHEMA = pa.schema(_FIELDS, {b"cmd_jax.thumbs": str(VERSION).encode()})


class Thumb(NamedTuple):
    """What is kept of a photograph.

    Attributes:
        webp: the whole picture, small.
        size: (width, height) of the photograph in pixels, upright.
        digest: of the bytes of the file, 64 hexadecimal digits.
        look: what doubles are found by.
        made_of: (bytes of the file, its time of change in nanoseconds, longest side of a thumbnail in pixels): while these are
            the same, so is the rest.
    """

    webp: bytes
    size: tuple[int, int]
    digest: str
    look: Look
    made_of: tuple[int, int, int]


def thumb_px(count: int) -> int:
    """The longer side of each of `count` thumbnails: as large as the page may be."""
    return int(np.clip((PAGE_BYTES / max(count, 1) / BYTES_PER_PIXEL) ** 0.5, *THUMB_PX))


def read_thumb(path: str, side_px: int, kept: Thumb | None = None) -> Thumb:
    """Reads a photograph, unless what is kept of it still holds. Raises BadImage."""
    name = printable(path)
    made_of = (*_stamp(path), side_px)
    if kept is not None and kept.made_of == made_of:
        return kept
    encoded = read_image_file(path, name)
    image = Image.fromarray(decode_rgb(encoded, name))
    small = image.copy()
    small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    webp = io.BytesIO()
    small.save(webp, "WEBP", quality=QUALITY, method=2)
    return Thumb(webp.getvalue(), image.size, hashlib.sha256(encoded).hexdigest(), look_of(image), made_of)


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:  # reading it says why
        return 0, 0
    return status.st_size, status.st_mtime_ns


def read_kept(path: str) -> tuple[dict[str, Thumb], str]:
    """What a file of `write_kept` holds, by path, and for people why nothing of it is used; "" where it is, or is missing."""
    if not os.path.exists(path):
        return {}, ""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(SCHEMA, check_metadata=True):
                return {}, f"{path} is no file of thumbnails of this version; the photographs are read again"
            rows = file.read().to_pylist()
        return {row.pop("path"): _thumb(row) for row in rows}, ""
    except Exception:  # whatever damaged bytes raise
        return {}, f"{path} is damaged; the photographs are read again"


def _thumb(row: dict[str, Any]) -> Thumb:
    grey = np.frombuffer(row["grey"], np.uint8).reshape(SIDE, SIDE)
    colours = np.frombuffer(row["colours"], np.uint8).reshape(COARSE, COARSE, 3)
    return Thumb(row["webp"], tuple(row["size"]), row["digest"], Look(grey, colours), tuple(row["made_of"]))


def write_kept(path: str, thumbs: Mapping[str, Thumb]) -> None:
    """Keeps thumbnails by path, whole or not at all."""
    rows = [
        thumb._asdict() | {"path": name, "grey": thumb.look.grey.tobytes(), "colours": thumb.look.colours.tobytes()}
        for name, thumb in thumbs.items()
    ]
    out = io.BytesIO()
    table = pa.Table.from_pylist(rows, SCHEMA)
    how = {"compression": "none", "use_dictionary": False, "write_statistics": False}  # nobody searches in it
    pq.write_table(table, out, **how, write_page_checksum=True)
    files.write(path, out.getvalue())
