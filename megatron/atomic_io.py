# SPDX-License-Identifier: Apache-2.0
"""Files that outlive a power cut, and what is in them as a digest. Knows no layout of a checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Entry:
    """What a file holds: its size, and the XXH3-128 digest of its content in hex.

    Made against faulty disks, memory and copies, not against forgers, who could as well write another manifest. It is ten times as fast
    as SHA-256: about 20 GB/s on one core, faster than any disk.
    """

    bytes: int
    xxh128: str


def new_digest() -> Any:
    """A digest to be fed with `update`; `hexdigest` gives what stands in an Entry (as does the command `xxh128sum`)."""
    return xxhash.xxh3_128()


def digest_of(path: Path) -> Entry:
    """Size and digest of a file, read in pieces."""
    digest, size = new_digest(), 0
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
