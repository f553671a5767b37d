# SPDX-License-Identifier: Apache-2.0
"""From what a user names (files, folders, globs) to the list of input files, what each of them is, and its bytes uncompressed.

A compressed file that was cut short raises one of DAMAGED when it is read.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from megatron.errors import DataError

JSON_LINES = (".jsonl", ".json", ".ndjson")
PLAIN = (".txt", ".md", ".py", ".rst")
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
ARCHIVES = (".zip", ".tar", ".tgz")
TABLES = (".parquet", ".arrow")
KNOWN = (*JSON_LINES, *PLAIN, *TABLES, *ARCHIVES, *COMPRESSED)
SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"


class FileKind(Enum):
    """What a file holds."""

    LINES = "JSON lines"
    TEXT = "plain text"
    PARQUET = "Parquet"
    ARROW = "Arrow"
    ZIP = "zip"
    TAR = "tar"


@dataclass(frozen=True)
class InputFile:
    """One file to read. compression: its last ending, or "" """

    path: Path
    kind: FileKind
    compression: str = ""


def kind_of(name: str) -> tuple[FileKind, str] | None:
    """What a file of this name holds and how it is compressed; None where the ending says nothing.

    >>> kind_of("a/b.jsonl.zst")
    (<FileKind.LINES: 'JSON lines'>, '.zst')
    """
    path = Path(name.lower())
    compression = path.suffix if path.suffix in COMPRESSED else ""
    ending = Path(path.stem).suffix if compression else path.suffix
    if ending in (".tar", ".tgz"):
        # tarfile finds out the compression itself.
        return FileKind.TAR, ""
    if ending in JSON_LINES:
        return FileKind.LINES, compression
    if ending in PLAIN:
        return FileKind.TEXT, compression
    if not compression:
        plain = {".parquet": FileKind.PARQUET, ".arrow": FileKind.ARROW, ".zip": FileKind.ZIP}.get(ending)
        return (plain, "") if plain else None
    return None


def find(given: str | Path | Sequence[str | Path], *, split: str | None = None) -> list[InputFile]:
    """The files meant by paths, folders (searched to the bottom, sorted) and globs (sorted), in the order given.

    A string may hold several, separated by commas. A folder written by `Dataset.save_to_disk` gives its Arrow files; one with several
    splits needs `split`. Raises DataError for what is absent, empty or of an unknown kind.
    """
    found: list[InputFile] = []
    for entry in _entries(given):
        path = Path(entry).expanduser()
        if path.is_dir():
            found += _in_folder(path, split)
        elif path.exists():
            found.append(_one(path))
        elif glob.has_magic(entry):
            matches = sorted(glob.glob(str(path), recursive=True))
            if not matches:
                raise DataError(f"no file matches {entry}", where="input", fix="check the pattern; quote it from the shell")
            found += [
                file for match in matches for file in (_in_folder(Path(match), split) if Path(match).is_dir() else [_one(Path(match))])
            ]
        else:
            raise DataError(f"there is no {entry}", where="input", fix="check the path")
    seen: set[Path] = set()
    for file in found:
        resolved = file.path.resolve()
        if resolved in seen:
            raise DataError(f"{file.path} is named twice", where="input", fix="its documents would be there twice: name it once")
        seen.add(resolved)
    return found


def _entries(given: str | Path | Sequence[str | Path]) -> Iterable[str]:
    for entry in [given] if isinstance(given, (str, Path)) else given:
        # A comma may be part of a name: a path that exists is taken whole.
        if isinstance(entry, Path) or Path(entry).exists():
            yield str(entry)
        else:
            yield from (part for part in str(entry).split(",") if part)


def _one(path: Path) -> InputFile:
    known = kind_of(path.name)
    if known is None:
        raise DataError(
            f"{path.name} has no ending that says what it is", where=str(path), fix=f"rename it; known endings: {', '.join(KNOWN)}"
        )
    return InputFile(path, *known)


def _in_folder(folder: Path, split: str | None) -> list[InputFile]:
    if (folder / SAVED_SPLITS).is_file():
        names = json.loads((folder / SAVED_SPLITS).read_text(encoding="utf-8"))["splits"]
        chosen = split if split is not None else (names[0] if len(names) == 1 else None)
        if chosen not in names:
            raise DataError(
                f"{folder} holds the splits {', '.join(names)}"
                + (f", and no {split!r}" if split is not None else "; which one is to be read is not said"),
                where=str(folder),
                fix=f"name one of them: {folder / names[0]}, or --split",
            )
        return _in_folder(folder / str(chosen), None)
    if (folder / SAVED_DATASET).is_file():
        state = json.loads((folder / SAVED_DATASET).read_text(encoding="utf-8"))
        if state.get("_indices_data_files"):
            raise DataError(
                f"{folder} was saved with an indices mapping", where=str(folder), fix="dataset.flatten_indices().save_to_disk(...) first"
            )
        return [InputFile(folder / entry["filename"], FileKind.ARROW) for entry in state["_data_files"]]
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder)))
    known = [InputFile(path, *kind) for path in files if (kind := kind_of(path.name)) is not None]
    if not known:
        raise DataError(f"{folder} holds no file to read", where=str(folder), fix=f"known endings: {', '.join(KNOWN)}")
    return known


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


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
