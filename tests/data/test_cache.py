"""Where decoded pictures are kept: estimates, the file on disk, what a crash or other data does to it."""

import os

import numpy as np
import psutil
import pytest

from cmd_jax.config import ConfigError
from cmd_jax.data import cache as cache_lib
from cmd_jax.data.cache import CanvasCache, plan
from tests.data.test_loader import Numbered, section

GIB = 2**30


@pytest.fixture
def room(monkeypatch, tmp_path):
    """Says how much memory and disk there is."""

    def say(memory_gib, disk_gib):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: type("memory", (), {"available": memory_gib * GIB}))
        monkeypatch.setattr(cache_lib.shutil, "disk_usage", lambda path: type("disk", (), {"free": disk_gib * GIB}))
        return str(tmp_path / "not" / "there" / "yet")

    return say


def test_the_plan_is_ram_or_disk_and_says_why(room):
    directory = room(8, 20)
    where = lambda **values: plan(Numbered(5994), section(cache_dir=directory, canvas_px=512, **values))
    assert where() == ("ram", "5,994 images at 512 px take 4.39 GiB of 8.00 GiB of free memory")
    assert where(cache="disk").kind == "disk"
    assert where(cache="none").kind == "none"
    room(5, 20)
    spilled = where()
    assert spilled.kind == "disk"
    assert spilled.note == f"5,994 images at 512 px take 4.39 GiB in {directory} (5.00 GiB of memory are free)"
    with pytest.raises(ConfigError, match=r"data\.cache is 'ram', but .* use data\.cache=disk, or lower .* to 488"):
        where(cache="ram")
    room(5, 4)
    with pytest.raises(ConfigError, match=r"5\.00 GiB of memory and 4\.00 GiB of disk at .*lower it, set data\.cache_dir"):
        where()
    assert where(cache="none").kind == "none"


def _read_all(source, config):
    cache = CanvasCache(source, config)
    loaded = [cache.load(index) for index in range(len(source))]
    for index, (canvas, size) in enumerate(loaded):
        assert np.all(canvas[:3, :4] == index)
        assert size.tolist() == [3, 4]
    return cache


@pytest.fixture
def disk(tmp_path):
    data = tmp_path / "data.bin"
    data.write_bytes(b"1")
    return section(cache="disk", cache_dir=str(tmp_path / "cache")), data


def test_a_file_serves_later_runs(disk):
    config, data = disk
    _read_all(Numbered(5, [data]), config)
    later = Numbered(5, [data])
    _read_all(later, config)
    assert later.reads.sum() == 0
    assert sorted(os.path.splitext(name)[1] for name in os.listdir(config.cache_dir)) == [".canvas", ".marks"]


def test_a_file_that_is_there_needs_no_room(disk, room):
    config, data = disk
    _read_all(Numbered(5, [data]), config)
    room(8, 0)
    _read_all(Numbered(5, [data]), config)
    with pytest.raises(ConfigError, match=r"0\.00 GiB of disk at"):
        CanvasCache(Numbered(6, [data]), config)


def test_other_data_sizes_and_grey_levels_get_another_file(disk):
    config, data = disk
    _read_all(Numbered(5, [data]), config)
    data.write_bytes(b"22")
    changed = Numbered(5, [data])
    _read_all(changed, config)
    assert changed.reads.sum() == 5
    config.canvas_px = 8
    _read_all(Numbered(5, [data]), config)
    config.grayscale = True
    _read_all(Numbered(5, [data]), config)
    assert len(os.listdir(config.cache_dir)) == 8


def test_what_a_crash_left_half_written_is_decoded_again(disk):
    config, data = disk
    cache = _read_all(Numbered(5, [data]), config)
    cache._canvas[2, 1] = 77  # the mark was written, the picture not
    cache._canvas.flush()
    later = Numbered(5, [data])
    _read_all(later, config)
    np.testing.assert_array_equal(later.reads, [0, 0, 1, 0, 0])


def test_a_file_of_another_length_is_made_anew_and_a_full_disk_is_named(disk, monkeypatch):
    config, data = disk
    _read_all(Numbered(5, [data]), config)
    for name in os.listdir(config.cache_dir):
        os.truncate(os.path.join(config.cache_dir, name), 10)
    _read_all(Numbered(5, [data]), config)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    data.write_bytes(b"333")
    with pytest.raises(ConfigError, match=r"\.canvas needs 0\.00 GiB \(No space left on device\); free the disk, or set"):
        CanvasCache(Numbered(5, [data]), config)
    assert not [name for name in os.listdir(config.cache_dir) if "partial" in name]
