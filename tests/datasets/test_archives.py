"""Archives that attack: refused before anything is read of them, with nothing written anywhere."""

import gzip
import io
import tarfile

import pytest

from cmd_jax.datasets import archives
from cmd_jax.datasets.prepared import open_source
from cmd_jax.errors import DatasetError
from tests.datasets import miniatures


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads all members of a.tgz in a directory, and looks whether anything was written around it."""
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")

    def run():
        before = sorted(tmp_path.rglob("*"))
        try:
            return [name for name, _ in archives.members(str(tmp_path / "a.tgz"), lambda name: True)]
        finally:
            assert sorted(tmp_path.rglob("*")) == before

    run.path = tmp_path / "a.tgz"
    return run


def _member(kind, link="", name="inner/x"):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


@pytest.mark.parametrize("name", ["../a.txt", "inner/../../a.txt", "/etc/cron.d/a", "//etc/a"])
def test_paths_that_escape_are_refused(read, name):
    miniatures.pack(read.path, {name: "a"})
    with pytest.raises(DatasetError, match=r"a\.tgz holds an unsafe member: .*; it is not the genuine archive"):
        read()


@pytest.mark.parametrize(
    "member",
    [
        _member(tarfile.SYMTYPE, "/etc/passwd"),
        _member(tarfile.SYMTYPE, "../../x"),
        _member(tarfile.LNKTYPE, "/etc/passwd"),
        _member(tarfile.LNKTYPE, "../x"),
        _member(tarfile.CHRTYPE),
        _member(tarfile.BLKTYPE),
        _member(tarfile.FIFOTYPE),
    ],
)
def test_escaping_links_and_devices_are_refused(read, member):
    miniatures.pack(read.path, {}, (member,))
    with pytest.raises(DatasetError, match="unsafe member"):
        read()


def test_inner_links_are_skipped(read):
    miniatures.pack(read.path, {"./inner/a.txt": "a"}, (_member(tarfile.SYMTYPE, "a.txt"), _member(tarfile.DIRTYPE)))
    assert read() == ["inner/a.txt"]


def test_limits_of_size_and_number(read, monkeypatch):
    miniatures.pack(read.path, {"a": "12345", "b": "12345"})
    assert read() == ["a", "b"]
    monkeypatch.setattr(archives, "MAX_MEMBERS", 1)
    with pytest.raises(DatasetError, match="b takes 5 bytes and is member 2; the limits are 268,435,456 and 1"):
        read()
    monkeypatch.setattr(archives, "MAX_TOTAL_BYTES", 9)
    with pytest.raises(DatasetError, match="over 9 bytes come out of it"):
        read()
    monkeypatch.undo()
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 4)
    with pytest.raises(DatasetError, match="a takes 5 bytes"):
        read()


def test_decompression_bombs_are_refused(read, monkeypatch):
    monkeypatch.setattr(archives, "RATIO_FREE_BYTES", 2**20)
    miniatures.pack(read.path, {"zeros": bytes(2**23)})
    assert read.path.stat().st_size < 2**14
    with pytest.raises(DatasetError, match="it unpacks to over 20 times its size, as no archive of images does"):
        read()


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_endless_headers_are_refused(read, kind, monkeypatch):
    """tarfile reads these whole, whatever their size."""
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 2**16)
    monkeypatch.setattr(archives, "HEADER_BYTES", 2**16)
    head = _member(kind)
    head.size = 2**30
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb") as packed:
        packed.write(head.tobuf(tarfile.USTAR_FORMAT) + bytes(2**20))
    read.path.write_bytes(out.getvalue())
    with pytest.raises(DatasetError, match="over 131,072 bytes come out of it"):
        read()


def test_tables_cannot_name_outside_files(tmp_path, monkeypatch):
    """What an archive's tables name is looked for in the archive alone."""
    (tmp_path / "secret.jpg").write_bytes(miniatures.jpeg(1))
    miniatures.expect(monkeypatch, "cub", 4, 2)
    files = miniatures.make_cub(tmp_path, 4, 2)
    table = "CUB_200_2011/images.txt"
    for name in ("../../secret.jpg", str(tmp_path / "secret.jpg"), "../../../../etc/passwd"):
        first, *rest = files[table].splitlines()
        miniatures.pack(tmp_path / miniatures.CUB_ARCHIVE, files | {table: "\n".join([f"{first.split()[0]} {name}", *rest])})
        config = _section(tmp_path)
        with pytest.raises(DatasetError, match="lacks 1 images, first"):
            open_source(config, "train")
        assert not list((tmp_path / "data").rglob("*.array_record*"))


def test_repeated_members_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        for _ in range(2):
            member = tarfile.TarInfo("a.jpg")
            tar.addfile(member)
    with pytest.raises(DatasetError, match=r"holds a\.jpg twice"):
        list(archives.images(str(tmp_path / "a.tgz"), {"a.jpg"}))


def _section(tmp_path):
    from cmd_jax.config import default

    config = default().data
    config.source, config.data_dir, config.manual_dir = "cub", str(tmp_path / "data"), str(tmp_path)
    return config
