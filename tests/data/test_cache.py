"""Where decoded images are kept: estimates, files that processes share, what a crash or other data does to them."""

import glob
import multiprocessing
import os
import secrets

import numpy as np
import pytest

from cmd_jax.data import cache as cache_lib
from cmd_jax.data.cache import SHARED_MEMORY, CanvasCache, Host, plan
from cmd_jax.errors import ConfigError
from tests.data.test_loader import Numbered, section

GIB = 2**30


@pytest.fixture
def room(monkeypatch, tmp_path):
    """Says how much memory, disk and memory for files there is."""

    def say(memory_gib, disk_gib, shared_gib=0):
        free = lambda path: (shared_gib if path == SHARED_MEMORY else disk_gib) * GIB
        monkeypatch.setattr(cache_lib, "available_memory", lambda: memory_gib * GIB)
        monkeypatch.setattr(cache_lib.shutil, "disk_usage", lambda path: type("disk", (), {"free": free(path)}))
        return str(tmp_path / "not" / "there" / "yet")

    return say


def test_the_plan_says_why(room):
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


def test_the_plan_of_several_processes(room):
    directory = room(8, 20, shared_gib=6)
    where = lambda host, **values: plan(Numbered(5994), section(cache_dir=directory, canvas_px=512, **values), host)
    shared = Host(shares=True)
    assert where(shared).kind == "ram"
    assert where(shared).note.endswith("4.39 GiB of 6.00 GiB of free memory, one copy for the processes of a machine")
    assert where(Host(groups=2)).kind == "disk"
    room(16, 20, shared_gib=6)
    assert where(Host(groups=2)).kind == "ram"
    assert where(Host(least=lambda value: min(value, 5 * GIB))).kind == "disk"  # another machine of the run has less
    room(8, 20, shared_gib=0.0625)
    assert "(0.06 GiB of /dev/shm, where processes share memory, are free)" in where(shared).note
    with pytest.raises(ConfigError, match=r"0\.06 GiB of /dev/shm, .*; enlarge /dev/shm \(docker run --ipc=host; .*=disk"):
        where(shared, cache="ram")
    assert where(Host(), cache="ram").kind == "ram"  # a process alone needs no file


def _least(barrier):
    return lambda value: (barrier.wait(60), value)[1]


def _other_process(barrier, answers, token, cache_dir):
    """Reads the odd images, then all, of a cache of each kind; sends what it decoded and saw."""
    for kind in ("ram", "disk"):
        source, config = Numbered(9), section(cache=kind, cache_dir=cache_dir)
        cache = CanvasCache(source, config, Host(1, shares=True, token=token, least=_least(barrier)))
        for index in range(1, 9, 2):
            cache.load(index)
        barrier.wait(60)
        seen = np.stack([cache.load(index)[0] for index in range(9)])
        answers.put((source.reads, seen))


def test_two_processes_share_one_cache(tmp_path):
    context, token = multiprocessing.get_context("spawn"), secrets.token_hex(8)
    barrier, answers = context.Barrier(2), context.Queue()
    other = context.Process(target=_other_process, args=(barrier, answers, token, str(tmp_path)))
    other.start()
    for kind in ("ram", "disk"):
        source, config = Numbered(9), section(cache=kind, cache_dir=str(tmp_path))
        cache = CanvasCache(source, config, Host(0, shares=True, token=token, least=_least(barrier)))
        assert not glob.glob(os.path.join(SHARED_MEMORY, f"*{token}*"))  # a kill from here on leaves nothing
        for index in range(0, 9, 2):
            cache.load(index)
        barrier.wait(60)
        seen = np.stack([cache.load(index)[0] for index in range(9)])
        reads, theirs = answers.get(timeout=60)
        np.testing.assert_array_equal(source.reads, [1, 0] * 4 + [1])
        np.testing.assert_array_equal(reads, [0, 1] * 4 + [0])
        np.testing.assert_array_equal(seen[:, 0, 0, 0], np.arange(9))
        np.testing.assert_array_equal(theirs, seen)
    other.join(60)
    assert other.exitcode == 0


def test_all_processes_stop_when_one_fails(tmp_path):
    fails = lambda value: 0.0 if isinstance(value, bool) else value
    with pytest.raises(ConfigError, match="another process of this run could not make its cache"):
        CanvasCache(Numbered(5), section(cache="disk", cache_dir=str(tmp_path)), Host(1, shares=True, least=fails))


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


def test_later_runs_reuse_the_file(disk):
    config, data = disk
    _read_all(Numbered(5, [data]), config)
    later = Numbered(5, [data])
    _read_all(later, config)
    assert later.reads.sum() == 0
    assert sorted(os.path.splitext(name)[1] for name in os.listdir(config.cache_dir)) == [".canvas", ".marks"]


def test_an_existing_file_needs_no_room(disk, room):
    config, data = disk
    _read_all(Numbered(5, [data]), config)
    room(8, 0)
    _read_all(Numbered(5, [data]), config)
    with pytest.raises(ConfigError, match=r"0\.00 GiB of disk at"):
        CanvasCache(Numbered(6, [data]), config)


def test_other_data_gets_another_file(disk):
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


def test_half_written_images_are_decoded_again(disk):
    config, data = disk
    cache = _read_all(Numbered(5, [data]), config)
    cache._canvas[2, 1] = 77  # the mark was written, the image not
    later = Numbered(5, [data])
    _read_all(later, config)
    np.testing.assert_array_equal(later.reads, [0, 0, 1, 0, 0])


def test_truncated_files_and_a_full_disk(disk, monkeypatch):
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
