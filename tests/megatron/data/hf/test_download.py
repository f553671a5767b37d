# SPDX-License-Identifier: Apache-2.0
"""Downloads from file URLs, and from a server on this machine that breaks off, is busy, or changes its file."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron.data.hf.download import Remote, fetch
from megatron.errors import DataError


def test_a_file_arrives_once_and_whole(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.write_bytes(b"content")
    sha256 = hashlib.sha256(b"content").hexdigest()
    remote = Remote(origin.as_uri(), "copy", size_bytes=7, sha256=sha256)
    assert fetch(remote, tmp_path / "raw").read_bytes() == b"content"
    origin.write_bytes(b"changed")
    assert fetch(remote, tmp_path / "raw").read_bytes() == b"content"
    with pytest.raises(DataError, match="the checksum is"):
        fetch(remote, tmp_path / "raw", again=True)
    origin.write_bytes(b"longer content")
    with pytest.raises(DataError, match="14 bytes arrived instead of 7"):
        fetch(remote, tmp_path / "raw", again=True)
    origin.unlink()
    with pytest.raises(DataError, match="the download failed") as caught:
        fetch(remote, tmp_path / "other")
    assert str(tmp_path / "other" / "copy") in (caught.value.fix or "")
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == ["copy", "copy.sha256"] and not list(
        (tmp_path / "other").iterdir()
    )


@dataclass
class Site:
    """One file at every path. behaviour: of the next requests, one each: a status, or how many bytes are sent before it breaks off"""

    content: bytes = b""
    version: str = '"one"'
    behaviour: list[Any] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def site() -> Iterator[Site]:
    served = Site(bytes(range(256)) * 40)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            served.ranges.append(self.headers.get("Range"))
            what = served.behaviour.pop(0) if served.behaviour else None
            if isinstance(what, tuple):
                self.send_response(what[0])
                for name, value in what[1].items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                return self.end_headers()
            found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            start = int(found[1]) if found and self.headers.get("If-Range") in (None, served.version) else 0
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(served.content) - 1}/{len(served.content)}")
            if served.version:
                self.send_header("ETag", served.version)
            self.send_header("Content-Length", str(len(served.content) - start))
            self.end_headers()
            self.wfile.write(served.content[start:][: what if isinstance(what, int) else None])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_address[1]}/file"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_breaks_off_goes_on_and_a_busy_server_is_waited_for(tmp_path: Path, site: Site) -> None:
    site.behaviour = [3000, (503, {}), 2000, (429, {"Retry-After": "33"}), (429, {})]
    waits: list[float] = []
    path = fetch(Remote(site.url, "copy"), tmp_path, wait=waits.append)
    assert path.read_bytes() == site.content
    assert site.ranges == [None, "bytes=3000-", "bytes=3000-", "bytes=5000-", "bytes=5000-", "bytes=5000-"]
    assert waits == [2, 4, 2, 33, 8]
    assert (tmp_path / "copy.sha256").read_text() == f"{hashlib.sha256(site.content).hexdigest()}  copy\n"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["copy", "copy.sha256"]


def test_a_later_call_goes_on_only_with_the_same_file(tmp_path: Path, site: Site) -> None:
    remote = Remote(site.url, "copy")
    for version, ranges in (('"one"', ["bytes=3000-"]), ('"two"', ["bytes=3000-"]), ("", [None])):
        site.version, site.behaviour = '"one"' if version else "", [3000, *[(500, {})] * 10]
        with pytest.raises(DataError, match="HTTP 500, 6 times") as caught:
            fetch(remote, tmp_path, again=True, wait=lambda seconds: None)
        assert "kept" in str(caught.value.fix) and (tmp_path / "copy.part").stat().st_size == 3000
        site.behaviour, site.ranges, site.version = [], [], version
        site.content = site.content[::-1] if version != '"one"' else site.content
        assert fetch(remote, tmp_path, again=True).read_bytes() == site.content
        assert site.ranges == ranges


def test_the_digest_of_the_first_download_is_kept(tmp_path: Path, site: Site) -> None:
    path = fetch(Remote(site.url, "copy"), tmp_path)
    assert fetch(Remote(site.url, "copy"), tmp_path) == path and len(site.ranges) == 1
    path.write_bytes(site.content[:-1] + b"!")
    with pytest.raises(DataError, match="the checksum is .*, and was") as caught:
        fetch(Remote(site.url, "copy"), tmp_path)
    assert caught.value.where == str(path)
    assert fetch(Remote(site.url, "copy"), tmp_path, again=True).read_bytes() == site.content
    (tmp_path / "mine").write_bytes(b"put here by hand")
    assert fetch(Remote(site.url, "mine"), tmp_path).read_bytes() == b"put here by hand"


def test_what_cannot_go_better_fails_at_once(tmp_path: Path, site: Site) -> None:
    for status in (404, 403):
        site.behaviour = [(status, {})]
        with pytest.raises(DataError, match=f"HTTP {status}"):
            fetch(Remote(site.url, "copy"), tmp_path, wait=lambda seconds: pytest.fail("waited"))
    assert not list(tmp_path.iterdir())
