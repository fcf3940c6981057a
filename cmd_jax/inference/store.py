"""Files of features: `.parquet` (read in pieces) or `.npz` (NumPy alone), with what they were made from inside.

Columns of a parquet file, arrays of an npz: path (text), features [F] float32; at patch level also patch_tokens [P * D] float16
and, of a network with a MIL scorer, mil_weights [P] float32, patches row-major; for labelling also patch_weights [P] float32.
`metadata` is a JSON object, see `Meta`.
"""

import contextlib
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cmd_jax.errors import DatasetError

SUFFIXES = (".parquet", ".npz")
KEY = b"cmd_jax"
SCHEMA = 1
CHUNK = 1024  # rows that are read at a time
DTYPES = {"features": np.float32, "patch_tokens": np.float16, "mil_weights": np.float32, "patch_weights": np.float32}
_REMEDY = "remove it and make it with python -m cmd_jax.embed"


class Meta(NamedTuple):
    """What a file of features was made from.

    Attributes:
        version: of this package.
        checkpoint: as it was named.
        step: of the checkpoint; None of other projects' weights.
        fingerprint: of the network and of how images are prepared.
        job: of network, images and options together.
        features: pools of a feature.
        crop_px: side of what was read of an image.
        grid: rows, and columns, of patches.
        widths: column -> numbers in a row.
        images: number of rows.
    """

    version: str
    checkpoint: str
    step: int | None
    fingerprint: str
    job: str
    features: str
    crop_px: int
    grid: int
    widths: dict[str, int]
    images: int


def write_part(path: str, names: Sequence[str], columns: dict[str, np.ndarray]) -> None:
    """Writes some rows, whole or not at all.

    Args:
        path: of a parquet file; its directory exists.
        names: of N images.
        columns: [N, ...] each, cast to DTYPES.
    """
    arrays: dict[str, pa.Array] = {"path": pa.array(names, pa.string())}
    for name, values in columns.items():
        flat = np.ascontiguousarray(values.reshape(len(names), -1), DTYPES[name])
        arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
    partial = f"{path}.partial"
    _write(partial, pa.table(arrays))
    os.replace(partial, path)


def _write(path: str, table: pa.Table) -> None:
    pq.write_table(table, path, compression="none", use_dictionary=False)  # neither makes features smaller


def count_rows(part: str) -> int | None:
    """Rows of a part; None if it is missing or was not written to its end."""
    try:
        return pq.read_metadata(part).num_rows
    except (OSError, pa.ArrowException):
        return None


def join_parts(parts: Sequence[str], path: str, meta: Meta) -> None:
    """Makes one file of parts, in the memory of one part.

    Args:
        parts: of `write_part`, in order, each with rows.
        path: ends in one of SUFFIXES; written in place.
        meta: of the whole.
    """
    (_join_parquet if path.endswith(".parquet") else _join_npz)(parts, path, meta)


def _join_parquet(parts: Sequence[str], path: str, meta: Meta) -> None:
    fields = [("path", pa.string())]
    fields += [(name, pa.list_(pa.from_numpy_dtype(DTYPES[name]), width)) for name, width in meta.widths.items()]
    schema = pa.schema(fields, {KEY: _to_json(meta)})
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for part in parts:
            writer.write_table(_table(part).cast(schema))


def _join_npz(parts: Sequence[str], path: str, meta: Meta) -> None:
    longest = max(max(map(len, _names(part))) for part in parts)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:

        def write(name: str, dtype: Any, shape: tuple[int, ...], pieces: Iterator[np.ndarray]) -> None:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
            entry = zipfile.ZipInfo(f"{name}.npy")  # without the time of day: the same rows are the same bytes
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for piece in pieces:
                    file.write(np.ascontiguousarray(piece, dtype).tobytes())

        write("metadata", np.dtype(f"U{len(_to_json(meta))}"), (), iter([np.array(_to_json(meta).decode())]))
        write("path", np.dtype(f"U{longest}"), (meta.images,), (np.array(_names(part), f"U{longest}") for part in parts))
        for name, width in meta.widths.items():
            pieces = (_column(_table(part, [name])[name], width) for part in parts)
            write(name, DTYPES[name], (meta.images, width), pieces)


def _table(part: str, columns: list[str] | None = None) -> pa.Table:
    # Not pq.read_table, which makes a column of a directory that is called step=3.
    with pq.ParquetFile(part) as file:
        return file.read(columns)


def _names(part: str) -> list[str]:
    return _table(part, ["path"])["path"].to_pylist()


def _column(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """[N, width] of a column of lists."""
    pieces = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in column.chunks]
    return np.concatenate(pieces) if pieces else np.zeros((0, width), np.float32)


def _to_json(meta: Meta) -> bytes:
    return json.dumps({"schema": SCHEMA, **meta._asdict()}).encode()


def read_meta(path: str) -> Meta:
    """What a file was made from, compared with its columns and with its size.

    Raises:
        DatasetError: it is missing, damaged, or no file of features.
    """
    with _reading(path):
        if path.endswith(".parquet"):
            file = pq.ParquetFile(path)
            try:
                text = (file.schema_arrow.metadata or {})[KEY]
                types = {field.name: field.type for field in file.schema_arrow}
                rows = file.metadata.num_rows
            finally:
                file.close()
            found = {
                name: (rows, kind.list_size, kind.value_type.to_pandas_dtype())
                for name, kind in types.items()
                if name != "path"
            }
            named = types.get("path") == pa.string()
        else:
            with zipfile.ZipFile(path) as archive:
                if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                    raise ValueError("its arrays are compressed")  # so that none is larger than the file
            with np.load(path, allow_pickle=False) as archive:
                text = str(archive["metadata"][()])
                found = {name: _header(path, name) for name in archive.files if name not in ("metadata", "path")}
                named = archive["path"].dtype.kind == "U" and archive["path"].ndim == 1
                rows = len(archive["path"])
        meta = _parse(json.loads(text))
        wanted = {name: (meta.images, width, DTYPES[name]) for name, width in meta.widths.items()}
        if not named or rows != meta.images or found != wanted:
            raise ValueError(f"its columns are {found}, its metadata says {wanted}")
        size = sum(rows * width * np.dtype(DTYPES[name]).itemsize for name, width in meta.widths.items())
        if size > os.path.getsize(path):
            raise ValueError(f"its header declares {size:,} bytes of numbers, more than the file holds")
        return meta


def _header(path: str, name: str) -> tuple[int, int, Any]:
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        (rows, width), _, dtype = read(file)
        return rows, width, dtype.type


def _parse(about: dict[str, Any]) -> Meta:
    if about.pop("schema") != SCHEMA:
        raise ValueError("its format is of another version")
    meta = Meta(**about)
    whole = [meta.crop_px, meta.grid, meta.images, *meta.widths.values(), *([] if meta.step is None else [meta.step])]
    texts = [meta.version, meta.checkpoint, meta.fingerprint, meta.job, meta.features]
    if not all(type(value) is int and value >= 0 for value in whole) or not all(isinstance(text, str) for text in texts):
        raise ValueError("its metadata has values of other types")
    if not {"features"} <= meta.widths.keys() <= DTYPES.keys() or min(meta.widths.values()) < 1 or meta.grid < 1:
        raise ValueError(f"its metadata has columns {sorted(meta.widths)} and a grid of {meta.grid}")
    if any(meta.widths.get(name, 0) % meta.grid**2 for name in meta.widths if name != "features"):
        raise ValueError(f"its patches are no grid of {meta.grid} x {meta.grid}")
    return meta


def rows(path: str, meta: Meta, columns: Sequence[str]) -> Iterator[tuple[list[str], dict[str, np.ndarray]]]:
    """The rows of a file in pieces: (paths of N images, column -> [N, width]).

    Raises:
        DatasetError: it is damaged, or has numbers that are not finite.
    """
    with _reading(path):
        if path.endswith(".parquet"):
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(CHUNK, columns=["path", *columns]):
                    table = pa.Table.from_batches([batch])
                    read = {name: _finite(name, _column(table[name], meta.widths[name])) for name in columns}
                    yield _texts(table["path"].to_pylist()), read
            return
        with np.load(path, allow_pickle=False) as archive:
            names, read = archive["path"], {name: archive[name] for name in columns}
        for start in range(0, meta.images, CHUNK):
            piece = slice(start, start + CHUNK)
            yield _texts(names[piece].tolist()), {name: _finite(name, array[piece]) for name, array in read.items()}


def _finite(name: str, array: np.ndarray) -> np.ndarray:
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{name} has numbers that are not finite")
    return array


def _texts(names: list[Any]) -> list[str]:
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a path is missing")
    return names


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Whatever reading damaged bytes raises becomes one DatasetError that names the file."""
    if not path.endswith(SUFFIXES):
        raise DatasetError(f"{path} is no file of features; it ends in {' or '.join(SUFFIXES)}")
    if not os.path.isfile(path):
        raise DatasetError(f"{path} does not exist; make it with python -m cmd_jax.embed")
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DatasetError(f"{path} is damaged or no file of features ({reason[:200]}); {_REMEDY}") from error
