"""A bucket without a network: fsspec's memory stands in for it."""

import contextlib

import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry


class Memory(MemoryFileSystem):
    """What fsspec.filesystem("gcs") makes where gcsfs is not installed; as a bucket, it makes no directories."""

    protocol = ("gcs", "gs")
    store: dict = {}
    pseudo_dirs: list = [""]

    def __init__(self, finalize_on_close: bool):
        assert finalize_on_close
        super().__init__()

    def _open(self, path, mode="rb", **options):
        if "a" in mode:
            raise NotImplementedError("objects of a bucket cannot be added to")
        return super()._open(path, mode, **options)


@contextlib.contextmanager
def bucket():
    """The address of an empty bucket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_registry, "gcs", Memory)
        backend.fsspec_backend._get_filesystem.cache_clear()
        yield "gs://bucket"
    Memory.store.clear()
    Memory.pseudo_dirs[:] = [""]
    backend.fsspec_backend._get_filesystem.cache_clear()
