# SPDX-License-Identifier: Apache-2.0
"""Files that outlive a power cut, and what is in them as a digest. Knows no layout of a checkpoint."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Entry:
    """What a file holds: its size, and the SHA-256 of its content in hex."""

    bytes: int
    sha256: str


def digest_of(path: Path) -> Entry:
    """Size and digest of a file, read in pieces."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return Entry(size, digest.hexdigest())


def sync_folder(path: Path) -> None:
    """Make sure that the names in a folder are on disk, as fsync does for a file's content."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a small file aside, flushed to disk, and rename it: whoever reads finds the old content or the new."""
    aside = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
