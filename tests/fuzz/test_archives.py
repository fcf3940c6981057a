"""Damaged archives and tables: what was there, a DatasetError or a BadImage, and nothing is written."""

import gzip
import io
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmd_jax.datasets import archives, cars
from cmd_jax.datasets.aircraft import AIRCRAFT
from cmd_jax.datasets.birds import CUB
from cmd_jax.datasets.dataset import example
from cmd_jax.errors import BadImage, DatasetError
from tests.datasets import miniatures
from tests.fuzz.mutations import cases, changes, mutate, report
from tests.parity.check import check_fixture

SPECIAL = st.sampled_from(
    [b"\n", b" ", b"\t", b"0", b"-1", b"999999999999", b"nan", b"\xff", b"\0", b"../", b"1e400", b"\xe2\x80\xae"]
)
table_changes = st.lists(
    st.tuples(st.just("write"), st.integers(0, 2**20), SPECIAL)
    | st.tuples(st.just("insert"), st.integers(0, 2**20), SPECIAL)
    | st.tuples(st.just("remove"), st.integers(0, 2**20), st.integers(1, 30)),
    min_size=1,
    max_size=3,
)


def _read(dataset, path):
    """All examples of a damaged archive."""
    annotations = dataset.read({dataset.layouts[0][0].name: path})
    for image in annotations.images.values():
        assert 0 <= image.label < len(annotations.class_names)
    for name, encoded in archives.images(path, set(annotations.images)):
        example(encoded, annotations.images[name], name, dataset.banner_px)


@pytest.fixture
def attempt(tmp_path, capsys):
    outcomes = Counter()

    def run(read, path, content):
        path.write_bytes(content)
        before = sorted(tmp_path.rglob("*"))
        try:
            read(str(path))
            outcomes["read"] += 1
        except (DatasetError, BadImage) as error:
            outcomes[type(error).__name__] += 1
        assert sorted(tmp_path.rglob("*")) == before
        capsys.readouterr()

    run.outcomes = outcomes
    return run


def test_damaged_archives(attempt, record_property, tmp_path):
    miniatures.make_cub(tmp_path, 4, 2)
    miniatures.make_aircraft(tmp_path, 4, 2)
    readers = {dataset.layouts[0][0].name: partial(_read, dataset) for dataset in (CUB, AIRCRAFT["variant"])}
    unpacked = {name: gzip.decompress((tmp_path / name).read_bytes()) for name in readers}
    whole = {name: gzip.compress(content, mtime=0) for name, content in unpacked.items()}  # the same in every run

    @cases(150)
    @given(st.sampled_from(sorted(readers)), changes)
    def packed(name, changes):
        attempt(readers[name], tmp_path / name, mutate(whole[name], changes))

    @cases(250)
    @given(st.sampled_from(sorted(readers)), changes, st.integers(0, 40))
    def inside(name, changes, block):
        # headers are a small part of a tar: most changes go to one of them
        start = 512 * block if block < 30 else 0
        attempt(readers[name], tmp_path / name, gzip.compress(mutate(unpacked[name], changes, start), 1, mtime=0))

    packed()
    inside()
    assert report(record_property, "damaged tar archives", attempt.outcomes) >= 200
    assert attempt.outcomes["read"] > 10


def test_damaged_tables(attempt, record_property, tmp_path):
    sources = {
        dataset.layouts[0][0].name: (partial(_read, dataset), make)
        for dataset, make in ((CUB, miniatures.make_cub), (AIRCRAFT["variant"], miniatures.make_aircraft))
    }
    whole = {name: make(tmp_path, 4, 2) for name, (_, make) in sources.items()}
    texts = {name: sorted(file for file in files if file.endswith(".txt")) for name, files in whole.items()}
    miniatures.make_cars(tmp_path, 4, 2, combined=True)
    annotations = (tmp_path / cars.ANNOTATIONS.name).read_bytes()

    @cases(200)
    @given(st.sampled_from(sorted(sources)), st.integers(0, 10), table_changes)
    def tables(name, number, changes):
        table = texts[name][number % len(texts[name])]
        changed = whole[name] | {table: mutate(whole[name][table].encode(), changes)}
        miniatures.pack(tmp_path / "packed.tgz", changed)
        attempt(sources[name][0], tmp_path / name, (tmp_path / "packed.tgz").read_bytes())

    @cases(200)
    @given(changes | table_changes)
    def matlab(changes):
        attempt(cars.read_combined, tmp_path / cars.ANNOTATIONS.name, mutate(annotations, changes, 128))

    tables()
    matlab()
    assert report(record_property, "damaged tables and .mat files", attempt.outcomes) >= 300
    assert attempt.outcomes["read"] > 10


def test_damaged_zip_files(record_property, tmp_path):
    outcomes = Counter()
    whole = (Path(__file__).parents[1] / "fixtures" / "schedules.npz").read_bytes()

    @cases(200)
    @given(changes)
    def attempt(changes):
        (tmp_path / "schedules.npz").write_bytes(mutate(whole, changes))
        outcomes[check_fixture(str(tmp_path), "schedules").status] += 1

    attempt()
    assert report(record_property, "damaged .npz files", outcomes) >= 200
    assert outcomes["FAIL"] > 50


def test_tar_headers_of_every_kind(attempt, record_property, tmp_path):
    names = st.sampled_from(
        ["a", "./a", "../a", "/a", "a/../../b", "a" * 300, "\x1b[31m", "é", "CON", "a\\..\\b", ".", "", "//a"]
    )
    kinds = st.sampled_from(
        [
            tarfile.REGTYPE,
            tarfile.LNKTYPE,
            tarfile.SYMTYPE,
            tarfile.CHRTYPE,
            tarfile.FIFOTYPE,
            tarfile.DIRTYPE,
            b"K",
            b"x",
            b"g",
            b"S",
        ]
    )

    @cases(200)
    @given(st.lists(st.tuples(names, kinds, names, st.integers(0, 40)), min_size=1, max_size=3), st.booleans())
    def forged(entries, pax):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz", format=tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT) as tar:
            for name, kind, link, size in entries:
                member = tarfile.TarInfo(name)
                member.type, member.linkname, member.size = kind, link, size
                tar.addfile(member, io.BytesIO(b"7" * size))
        attempt(lambda path: list(archives.members(path, lambda name: True)), tmp_path / "a.tgz", out.getvalue())

    forged()
    assert report(record_property, "tar archives of forged members", attempt.outcomes) >= 150
    assert min(attempt.outcomes["read"], attempt.outcomes["DatasetError"]) > 10
