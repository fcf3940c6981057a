"""What is kept of photographs comes back as it was, is used while its file is the same, and is given up where it is damaged."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cmd_jax.labelling.thumbs import read_kept, read_thumb, write_kept


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 70, 3), np.uint8)).save(path)
    return path


def _plain(thumb):
    return thumb._replace(look=tuple(array.tolist() for array in thumb.look))


def test_unchanged_photographs_are_not_read(photo, tmp_path):
    first, kept_in = read_thumb(str(photo), 48), str(tmp_path / "thumbs.parquet")
    assert read_kept(kept_in) == ({}, "")
    write_kept(kept_in, {"a.png": first, "b.png": first})
    kept, reason = read_kept(kept_in)
    assert (kept.keys(), reason) == ({"a.png", "b.png"}, "")
    assert _plain(kept["b.png"]) == _plain(first)
    assert read_thumb(str(photo), 48, kept["a.png"]) is kept["a.png"]
    assert _plain(read_thumb(str(photo), 40, kept["a.png"])) == _plain(read_thumb(str(photo), 40))
    size, time = photo.stat().st_size, photo.stat().st_mtime_ns
    os.utime(photo, ns=(time, time + 1))
    again = read_thumb(str(photo), 48, kept["a.png"])
    assert again.made_of == (size, time + 1, 48)
    assert _plain(again._replace(made_of=first.made_of)) == _plain(first)


def test_damaged_and_foreign_files_are_given_up(photo, tmp_path):
    path = tmp_path / "thumbs.parquet"
    write_kept(str(path), {"a.png": read_thumb(str(photo), 48)})
    whole = path.read_bytes()
    at = whole.index(b"RIFF") + 100  # inside the thumbnail, where nothing but the checksum tells
    for damaged in (b"", whole[:-9], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
        path.write_bytes(damaged)
        assert read_kept(str(path)) == ({}, f"{path} is damaged; the photographs are read again")
    pq.write_table(pa.table({"path": ["a.png"]}), path)
    assert read_kept(str(path)) == ({}, f"{path} is no file of thumbnails of this version; the photographs are read again")
