# SPDX-License-Identifier: Apache-2.0
"""A read-only Hugging Face Hub on this machine: repositories of files held in memory, and answers that go wrong on request."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

NAME = r"(?P<name>[^/]+(?:/[^/]+)?)"
API = r"/api/(?P<kind>datasets|models)/" + NAME
ROUTES = (
    ("info", re.compile(API + r"(?:/revision/(?P<revision>[^/]+))?")),
    ("tree", re.compile(API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?")),
    ("paths", re.compile(API + r"/paths-info/(?P<revision>[^/]+)")),
    ("file", re.compile(r"/(?:(?P<kind>datasets)/)?" + NAME + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")),
)

OF_THE_CLIENT = ("/api/agent-harnesses",)
"""What huggingface-hub 2 asks for by itself, about no repository and without a token; the real Hub answers, this one has none."""


@dataclass
class Fault:
    """The next `times` requests whose "METHOD path" matches get this status and these headers."""

    match: str
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1


@dataclass
class Hub:
    """files: (kind, name) -> path -> content, where the kind is datasets or models"""

    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    url: str = ""

    def commit(self, kind: str, name: str) -> str:
        """Changes with the files."""
        digest = hashlib.sha1()
        for path, content in sorted(self.files[kind, name].items()):
            digest.update(path.encode() + b"\0" + content)
        return digest.hexdigest()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """The hub answers at `hub.url`."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path in OF_THE_CLIENT:
            return self._send(404, b"{}", {})
        hub.log.append(f"{self.command} {path}")
        hub.tokens.add(self.headers.get("Authorization", ""))
        for fault in hub.faults:
            if fault.times and re.search(fault.match, f"{self.command} {path}"):
                fault.times -= 1
                return self._send(fault.status, b"{}", fault.headers)
        for what, pattern in ROUTES:
            found = pattern.fullmatch(path)
            if found is None:
                continue
            parts = {key: unquote(value) if value else value for key, value in found.groupdict().items()}
            key = (parts.get("kind") or "models", str(parts["name"]))
            if key not in hub.files:
                continue
            commit = hub.commit(*key)
            if parts.get("revision") not in (None, "main", "refs/convert/parquet", commit):
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return self._repo(what, hub.files[key], commit, parts, body)
        return self._send(404, b'{"error": "not found"}', {"X-Error-Code": "RepoNotFound"})

    def _repo(self, what: str, files: dict[str, bytes], commit: str, parts: dict[str, str | None], body: bytes) -> None:
        path = parts.get("path") or ""
        if what == "info":
            siblings = [{"rfilename": name} for name in sorted(files)]
            return self._json({"id": parts["name"], "sha": commit, "private": False, "siblings": siblings, "tags": [], "gated": False})
        if what == "tree":
            inside = {name: content for name, content in files.items() if name.startswith(f"{path}/" if path else "")}
            if path and not inside:
                return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            folders = {"/".join(name.split("/")[:depth]) for name in inside for depth in range(1, name.count("/") + 1)}
            return self._json(
                [*({"type": "directory", "path": name, "oid": "0", "size": 0} for name in sorted(folders)), *map(_entry, inside.items())]
            )
        if what == "paths":
            asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
            return self._json([_entry((name, files[name])) for name in asked if name in files])
        if path not in files:
            return self._send(404, b"Entry not found", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(content)}"', "Accept-Ranges": "bytes"}
        asked_range = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked_range is None:
            return self._send(200, content, headers)
        start, end = int(asked_range[1]), int(asked_range[2] or len(content) - 1)
        return self._send(206, content[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(item: tuple[str, bytes]) -> dict[str, Any]:
    return {"type": "file", "path": item[0], "size": len(item[1]), "oid": _oid(item[1])}
