"""Downloads from a server of the test's own: whole, continued, refused."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cmd_jax.datasets import archives, download, preparation
from cmd_jax.errors import DatasetError
from tests.datasets import miniatures

CONTENT = bytes(range(256)) * 40


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.asked.append(self.headers.get("Range"))
        start = (
            int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if "Range" in self.headers and server.ranges else 0
        )
        if self.path != "/a.tgz":
            self.send_error(404)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        self.wfile.write(server.content[start : server.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        running.asked, running.ranges, running.cut, running.content = [], True, None, CONTENT
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def _archive(server, **changes):
    url = f"http://127.0.0.1:{server.server_address[1]}/a.tgz"
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    return archives.Archive("a.tgz", "https://a.example", url=url, size=len(CONTENT), sha256=sha256)._replace(**changes)


def test_interrupted_downloads_resume(server, tmp_path, capsys):
    server.cut = 5000
    with pytest.raises(DatasetError, match=r"could not be fetched .*5,000 bytes are kept in .*a\.tgz\.partial.*run again"):
        download.download(_archive(server), str(tmp_path / "new"))
    server.cut = None
    path = download.download(_archive(server), str(tmp_path / "new"))
    assert server.asked == [None, "bytes=5000-"]
    assert Path(path).read_bytes() == CONTENT
    assert [item.name for item in (tmp_path / "new").iterdir()] == ["a.tgz"]
    assert "download of a.tgz: 0/0 MB" in capsys.readouterr().out


def test_prepare_downloads_what_is_missing(server, tmp_path, monkeypatch):
    miniatures.make_cub(tmp_path)
    server.content = (tmp_path / "CUB_200_2011.tgz").read_bytes()
    sha256 = hashlib.sha256(server.content).hexdigest()
    here = _archive(server, name="CUB_200_2011.tgz", size=len(server.content), sha256=sha256)
    miniatures.expect(monkeypatch, "cub", layouts=((here,),))
    lines = preparation.prepare_dataset("cub", str(tmp_path / "data"), None, False, threads=1)
    assert lines[0] == "cub: 36 train, 12 test images, 2 classes"
    assert (tmp_path / "data" / "downloads" / "manual" / "CUB_200_2011.tgz").read_bytes() == server.content
    summary = json.loads((tmp_path / "data" / "cub" / "1.0.0" / "summary.json").read_text())
    assert summary["archives"] == {"CUB_200_2011.tgz": sha256}
    assert server.asked == [None]


def test_servers_without_ranges_start_again(server, tmp_path):
    (tmp_path / "a.tgz.partial").write_bytes(b"x" * 100)
    server.ranges = False
    path = download.download(_archive(server), str(tmp_path))
    assert Path(path).read_bytes() == CONTENT


def test_complete_partial_files_are_not_fetched(server, tmp_path):
    (tmp_path / "a.tgz.partial").write_bytes(CONTENT)
    download.download(_archive(server), str(tmp_path))
    assert server.asked == []


def test_wrong_files_are_removed(server, tmp_path):
    with pytest.raises(DatasetError, match=r"has sha256 .*, the genuine a\.tgz has 00; download it again"):
        download.download(_archive(server, sha256="00"), str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_dead_links_and_full_disks(server, tmp_path, monkeypatch):
    dead = _archive(server, url=f"http://127.0.0.1:{server.server_address[1]}/gone.tgz")
    with pytest.raises(DatasetError, match=r"HTTP Error 404.*or put a\.tgz from https://a\.example into "):
        download.download(dead, str(tmp_path))
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("usage", (), {"free": 7}))
    with pytest.raises(DatasetError, match="10,240 bytes are to come, the disk has 7 free"):
        download.download(_archive(server), str(tmp_path))
