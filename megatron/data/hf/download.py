# SPDX-License-Identifier: Apache-2.0
"""One file from the network, checked and then renamed into place; a download that broke off goes on where it stopped.

<file>.part       what has arrived
<file>.part.of    what the server said that it is a part of
<file>.part.lock  held by the process that downloads
<file>.sha256     the digest at the first download, as `sha256sum -c` reads it; checked whenever the file is used again
"""

from __future__ import annotations

import errno
import http.client
import socket
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from megatron.data.fingerprint import digest_of
from megatron.errors import DataError
from megatron.hub.client import Sleep, asked_wait
from megatron.log import get_logger

log = get_logger(__name__)

BLOCK_BYTES = 1 << 20
TIMEOUT_S = 30
TRIES = 6
LONGEST_WAIT_S = 600.0
BUSY = (408, 425, 429, 500, 502, 503, 504)
PARTIAL_CONTENT, RANGE_NOT_SATISFIABLE = 206, 416


@dataclass(frozen=True)
class Remote:
    """A file on the network. `size_bytes` and `sha256` are checked where they are known."""

    url: str
    file_name: str
    size_bytes: int | None = None
    sha256: str | None = None


def fetch(remote: Remote, folder: Path, *, again: bool = False, wait: Sleep = time.sleep) -> Path:
    """The file in `folder`, downloaded unless it is there. Raises DataError when it cannot be had whole, or is not what it was."""
    path = folder / remote.file_name
    if path.exists() and not again:
        _check(path, remote)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.part")
    lock = path.with_name(f"{aside.name}.lock")
    try:
        with FileLock(lock, timeout=0):
            try:
                _download(remote, aside, path, wait)
                digest = _checked(remote, aside, path)
                _beside(path).unlink(missing_ok=True)
                aside.replace(path)
                _discard(aside)
                _beside(path).write_text(f"{digest}  {path.name}\n", encoding="utf-8")
            finally:
                lock.unlink(missing_ok=True)
    except Timeout as error:
        raise DataError("another process is downloading it", where=str(path), fix="wait for it") from error
    return path


def _checked(remote: Remote, aside: Path, path: Path) -> str:
    """The digest of what has arrived, which goes where it is not the one known."""
    digest = _sha256(aside)
    if remote.sha256 and digest != remote.sha256:
        _discard(aside)
        raise DataError(
            f"the checksum is {digest}, not {remote.sha256}",
            where=remote.url,
            fix=f"the file changed or was damaged; {_by_hand(path)}",
        )
    return digest


def _check(path: Path, remote: Remote) -> None:
    """Raise DataError unless the file is what it was at the first download. A file put there by hand without a digest is taken as it is."""
    try:
        kept = _beside(path).read_text(encoding="utf-8").split()[0]
    except (OSError, IndexError):
        kept = None
    expected = remote.sha256 or kept
    if expected is not None and (found := _sha256(path)) != expected:
        raise DataError(
            f"the checksum is {found}, and was {expected}" if expected == kept else f"the checksum is {found}, not {expected}",
            where=str(path),
            fix=f"download it again (-f), or remove {_beside(path).name} if the change is yours",
        )


def _download(remote: Remote, aside: Path, path: Path, wait: Sleep) -> None:
    """Everything that is still missing, behind what has arrived; a file into which nothing came is not left."""
    with aside.open("ab") as out:
        try:
            tries = 0
            while True:
                before = out.tell()
                try:
                    return _continue(remote, out)
                except (OSError, http.client.HTTPException) as error:
                    why, seconds = _until_next(error, out, remote, path)
                # Only tries that bring nothing count: a large file may break off many times.
                tries = 1 if out.tell() > before else tries + 1
                if tries >= TRIES:
                    raise _failed(f"{why}, {tries} times", remote, path)
                seconds = min(2.0**tries if seconds is None else seconds, LONGEST_WAIT_S)
                log.warning("%s: %s after %d bytes; going on in %.0f s", remote.url, why, out.tell(), seconds)
                wait(seconds)
        except BaseException:
            if aside.stat().st_size == 0:
                _discard(aside)
            raise


def _until_next(error: Exception, out: IO[bytes], remote: Remote, path: Path) -> tuple[str, float | None]:
    """What went wrong, and the seconds that the server asks for. Raises DataError where a later try cannot go better."""
    reason = getattr(error, "reason", error)
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        if error.code == RANGE_NOT_SATISFIABLE and out.tell():
            _restart(out)
        elif error.code not in BUSY:
            raise _failed(f"HTTP {error.code} {reason}", remote, path) from error
        return f"HTTP {error.code}", asked_wait(dict(error.headers))
    lasting = isinstance(reason, socket.gaierror | FileNotFoundError | PermissionError | IsADirectoryError)
    if lasting or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) or "unknown url type" in str(reason):
        raise _failed(str(reason), remote, path) from error
    return str(reason), None


def _continue(remote: Remote, out: IO[bytes]) -> None:
    """One request. Raises the errors of urllib, and ConnectionError when less arrives than was said."""
    note = Path(f"{out.name}.of")
    start = out.tell()
    validator = note.read_text(encoding="utf-8") if note.exists() else ""
    if not validator and not remote.sha256:
        start = 0  # the file may be another by now, and nobody would notice
    headers = {"Range": f"bytes={start}-", **({"If-Range": validator} if validator else {})} if start else {}
    log.info("downloading %s%s", remote.url, f" from byte {start} on" if start else "")
    with urllib.request.urlopen(urllib.request.Request(remote.url, headers=headers), timeout=TIMEOUT_S) as response:
        goes_on = response.status == PARTIAL_CONTENT and (response.headers.get("Content-Range") or "").startswith(f"bytes {start}-")
        if not start or not goes_on:
            start = _restart(out)
            note.write_text(_validator(response.headers), encoding="utf-8")
        said = int(response.headers.get("Content-Length") or 0)
        expected = remote.size_bytes or (start + said if said else None)
        while block := response.read(BLOCK_BYTES):
            out.write(block)
        out.flush()
    if said and out.tell() < start + said:
        raise ConnectionError(f"the connection broke off at byte {out.tell()} of {start + said}")
    if expected is not None and out.tell() != expected:
        size = out.tell()
        _restart(out)
        raise DataError(f"{size} bytes arrived instead of {expected}", where=remote.url, fix="try again; the file may have changed")


def _validator(headers: Any) -> str:
    """What tells this version of the file from others: a strong ETag, or a date."""
    tag = headers.get("ETag") or ""
    return str(tag if tag.startswith('"') else headers.get("Last-Modified") or "")


def _restart(out: IO[bytes]) -> int:
    out.seek(0)
    out.truncate()
    return 0


def _failed(why: str, remote: Remote, path: Path) -> DataError:
    return DataError(
        f"the download failed: {why}",
        where=remote.url,
        fix=f"check the network and run this again (what has arrived is kept); or {_by_hand(path)}",
    )


def _by_hand(path: Path) -> str:
    return f"download it elsewhere and put it at {path}"


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _discard(aside: Path) -> None:
    aside.unlink(missing_ok=True)
    aside.with_name(f"{aside.name}.of").unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    return digest_of(path, whole=True).partition(":")[2]
