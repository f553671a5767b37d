# SPDX-License-Identifier: Apache-2.0
"""Texts out of files, one document at a time: JSON lines (plain, gzip, zstd), plain text, zip. Knows no tokenizer."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from megatron.errors import BackendError, DataError

JSON_LINES = (".jsonl", ".json", ".ndjson")
PLAIN = (".txt", ".md", ".py", ".rst")
KNOWN = (*JSON_LINES, *PLAIN, ".gz", ".zst", ".zip")


def read_texts(paths: Iterable[Path], *, key: str = "text") -> Iterator[str]:
    """Documents of files and folders (folders sorted, searched to the bottom), in order.

    A JSON line gives its string under `key`, a plain text file is one document, a zip gives one document per member.
    Raises DataError naming file and line.
    """
    for path in paths:
        if path.is_dir():
            files = sorted(found for found in path.rglob("*") if found.is_file() and found.suffix in KNOWN)
            if not files:
                raise DataError(f"{path} holds no text file", where=str(path), mend=f"known endings: {', '.join(KNOWN)}")
            yield from read_texts(files, key=key)
        elif path.exists():
            yield from _read_file(path, key)
        else:
            raise DataError(f"there is no {path}", where=str(path), mend="check the path")


def _read_file(path: Path, key: str) -> Iterator[str]:
    if path.suffix == ".zip":
        yield from _read_zip(path)
        return
    inner = path.with_suffix("").suffix if path.suffix in (".gz", ".zst") else path.suffix
    with _open(path) as lines:
        if inner in JSON_LINES:
            yield from _json_lines(lines, path, key)
        else:
            yield lines.read()


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise BackendError(
                "reading .zst files needs the package zstandard", where=str(path), mend="uv pip install zstandard"
            ) from error
        return io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True), encoding="utf-8")
    return path.open(encoding="utf-8")


def _json_lines(lines: Iterable[str], path: Path, key: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"not JSON: {error}", where=f"{path}:{number}", mend="one JSON object per line") from error
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            names = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(f"no text under {key!r} (found: {names})", where=f"{path}:{number}", mend="name the key that holds the text")
        yield record[key]


def _read_zip(path: Path) -> Iterator[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if not name.endswith("/"):
                    yield archive.read(name).decode("utf-8", errors="replace")
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is not a zip file", where=str(path), mend="download it again") from error
