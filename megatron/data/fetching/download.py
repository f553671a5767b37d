# SPDX-License-Identifier: Apache-2.0
"""One file from the network, checked and then renamed into place. Knows no corpus."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import DataError
from megatron.log import get_logger

log = get_logger(__name__)

BLOCK_BYTES = 1 << 20
TIMEOUT_S = 30


@dataclass(frozen=True)
class Remote:
    """A file on the network. `size_bytes` and `sha256` are checked where they are known."""

    url: str
    file_name: str
    size_bytes: int | None = None
    sha256: str | None = None


def fetch(remote: Remote, folder: Path, *, again: bool = False) -> Path:
    """The file in `folder`, downloaded unless it is there. Raises DataError when it cannot be had whole."""
    path = folder / remote.file_name
    if path.exists() and not again:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    log.info("downloading %s", remote.url)
    by_hand = f"download it elsewhere and put it at {path}"
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(remote.url, timeout=TIMEOUT_S) as response, aside.open("wb") as out:
            expected = remote.size_bytes or int(response.headers.get("Content-Length") or 0)
            while block := response.read(BLOCK_BYTES):
                digest.update(block)
                out.write(block)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        aside.unlink(missing_ok=True)
        raise DataError(
            f"the download failed: {getattr(error, 'reason', error)}", where=remote.url, mend=f"check the network; or {by_hand}"
        ) from error
    size = aside.stat().st_size
    if expected and size != expected:
        aside.unlink()
        raise DataError(f"{size} bytes arrived instead of {expected}", where=remote.url, mend=f"try again; or {by_hand}")
    if remote.sha256 and digest.hexdigest() != remote.sha256:
        aside.unlink()
        raise DataError(
            f"the checksum is {digest.hexdigest()}, not {remote.sha256}",
            where=remote.url,
            mend=f"the file changed or was damaged; {by_hand}",
        )
    aside.replace(path)
    return path
