# SPDX-License-Identifier: Apache-2.0
"""Compressed files as streams of bytes that raise where a file was cut short. Knows no records."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import IO, Any, cast

import zstandard

READ_BYTES = 1 << 18
DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zstandard.ZstdError)


class ZstdReader(io.RawIOBase):
    """The content of a .zst file, frame after frame. (zstandard's own reader takes a file cut short for one that ended.)"""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as may be; 0 at the end. Raises EOFError in the midst of a frame."""
        while not self._ready:
            data = self._raw.read(READ_BYTES)
            if not data:
                if self._frame is not None:
                    raise EOFError("it ends in the midst of a zstd frame")
                return 0
            self._ready = self._decompress(data)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _decompress(self, data: bytes) -> bytes:
        parts = []
        while data:
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            parts.append(self._frame.decompress(data))
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        return b"".join(parts)


def open_compressed(path: Path, compression: str) -> tuple[IO[bytes], IO[bytes]]:
    """The content, and the file as it lies on disk (whose position tells progress). The same object where nothing is compressed."""
    raw = path.open("rb")
    return (raw if not compression else reader(raw, compression)), raw


def reader(raw: IO[bytes], compression: str) -> IO[bytes]:
    """The content of an open file. compression: .gz, .zst, .xz, .bz2 or "" """
    if compression == ".gz":
        return cast(IO[bytes], io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=raw))))
    if compression == ".zst":
        return cast(IO[bytes], io.BufferedReader(ZstdReader(raw), READ_BYTES))
    if compression == ".xz":
        return cast(IO[bytes], lzma.LZMAFile(raw))
    if compression == ".bz2":
        return cast(IO[bytes], bz2.BZ2File(raw))
    return raw
