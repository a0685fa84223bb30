"""Tars behind a web server that gives ranges: a file system of fsspec with an event loop of its own, as those of cloud
stores have, which must be made anew in processes that are forked."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from maefast.data import remote
from maefast.data.images.files import find_images
from maefast.errors import Unreachable
from maefast.train import pretrain
from tests.data.sources import encoded, write_shards
from tests.train.common import losses, tiny_config

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """(address, requests as they came, a list of what to do with the next ones) of a server of tmp_path."""
    monkeypatch.setenv("MAEFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    asked, troubles = [], []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body):
            asked.append((self.command, self.path, self.headers.get("Range")))
            if troubles and self.command == "GET":
                trouble = troubles.pop(0)
                if trouble == "hang":
                    release.wait(10)
                self.send_error(503)
                return
            path = tmp_path / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            data, status = path.read_bytes(), 200
            self.protocol_version = "HTTP/1.1"
            if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                whole, status = len(data), 206
                data = data[int(span[1]) : int(span[2]) + 1 if span[2] else None]
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Accept-Ranges", "bytes")
            if status == 206:
                self.send_header("Content-Range", f"bytes {span[1]}-{int(span[1]) + len(data) - 1}/{whole}")
            self.end_headers()
            if body:
                self.wfile.write(data)

        def do_GET(self):
            self.answer(True)

        def do_HEAD(self):
            self.answer(False)

        def log_message(self, *_):
            pass

    release = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked, troubles
    release.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_of_a_web_server(site, tmp_path, workers):
    address, asked, _ = site
    write_shards(tmp_path / "shards")
    pretrain(tiny_config(tmp_path / "shards", tmp_path / "near", cache_mb=0))
    data = f"{address}/shards/{{0000..0001}}.tar"
    pretrain(tiny_config(data, tmp_path / "far", workers=workers, cache_mb=0))
    assert losses(tmp_path / "far") == losses(tmp_path / "near")
    members = [span for command, _, span in asked if command == "GET" and span]
    assert len(members) > 40  # one by one


def test_a_server_in_trouble(site, tmp_path, monkeypatch):
    address, _, troubles = site
    write_shards(tmp_path / "shards")
    images = find_images(f"{address}/shards/0000.tar")
    troubles += ["error", "error"]
    assert images.path(2).read() == encoded(2)
    monkeypatch.setenv("MAEFAST_REMOTE_TIMEOUT", "0.3")
    monkeypatch.setenv("MAEFAST_REMOTE_ATTEMPTS", "2")
    troubles += ["hang", "hang"]
    with pytest.raises(Unreachable, match=r"no answer in 2 attempts of up to 0\.3 s: TimeoutError"):
        images.path(2).read()
    troubles += ["error"] * 2
    with pytest.raises(Unreachable, match="503"):
        images.path(3).read()
