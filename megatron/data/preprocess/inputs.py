# SPDX-License-Identifier: Apache-2.0
"""From what a user names (files, folders, globs) to the list of input files, what each of them is, and its bytes uncompressed.

A compressed file that was cut short raises one of DAMAGED, or an OSError without a number, when it is read.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any, cast

from megatron.errors import DataError

JSON_LINES = (".jsonl", ".json", ".ndjson")
PLAIN = (".txt", ".md", ".py", ".rst")
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
ARCHIVES = (".zip", ".tar", ".tgz")
TABLES = (".parquet", ".arrow")
KNOWN = (*JSON_LINES, *PLAIN, *TABLES, *ARCHIVES, *COMPRESSED)
READ_BYTES = 1 << 18
DAMAGED = (EOFError, lzma.LZMAError, zlib.error)
SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"


class FileKind(Enum):
    """What a file holds."""

    LINES = "JSON lines"
    TEXT = "plain text"
    PARQUET = "Parquet"
    ARROW = "Arrow"
    ZIP = "zip"
    TAR = "tar"


KINDS = {
    **dict.fromkeys(JSON_LINES, FileKind.LINES),
    **dict.fromkeys(PLAIN, FileKind.TEXT),
    **dict.fromkeys((".tar", ".tgz"), FileKind.TAR),
    **{".parquet": FileKind.PARQUET, ".arrow": FileKind.ARROW, ".zip": FileKind.ZIP},
}


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
    kind = KINDS.get(Path(path.stem).suffix if compression else path.suffix)
    if kind is FileKind.TAR:
        return kind, ""  # tarfile finds out the compression itself
    return (kind, compression) if kind and (not compression or kind in (FileKind.LINES, FileKind.TEXT)) else None


def find(given: str | Path | Sequence[str | Path], *, split: str | None = None) -> list[InputFile]:
    """The files meant by paths, folders (searched to the bottom, sorted) and globs (sorted), in the order given.

    A string may hold several, separated by commas. A folder written by `Dataset.save_to_disk` gives its Arrow files; one with several
    splits needs `split`. Raises DataError for what is absent, empty or of an unknown kind.
    """
    found: list[InputFile] = []
    for entry in _entries(given):
        path = Path(entry).expanduser()
        pattern = glob.has_magic(entry) and not path.exists()
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))] if pattern else [path]
        if not matches:
            raise DataError(f"no file matches {entry}", where="input", fix="check the pattern; quote it from the shell")
        if not matches[0].exists():
            raise DataError(f"there is no {entry}", where="input", fix="check the path")
        for match in matches:
            found += _in_folder(match, split) if match.is_dir() else [_one(match)]
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
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "/." not in f"/{path.relative_to(folder)}")
    known = [InputFile(path, *kind) for path in files if (kind := kind_of(path.name)) is not None]
    if not known:
        raise DataError(f"{folder} holds no file to read", where=str(folder), fix=f"known endings: {', '.join(KNOWN)}")
    return known


def open_compressed(path: Path, compression: str) -> tuple[IO[bytes], IO[bytes]]:
    """The content, and the file as it lies on disk (whose position tells progress). The same object where nothing is compressed."""
    raw = path.open("rb")
    return (raw if not compression else reader(raw, compression)), raw


def reader(raw: IO[bytes], compression: str) -> IO[bytes]:
    """The content of an open file. compression: .gz, .zst, .xz, .bz2 or "" """
    openers: dict[str, Callable[[], Any]] = {
        ".gz": lambda: io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=raw))),
        ".zst": lambda: _zstd(raw),
        ".xz": lambda: lzma.LZMAFile(raw),
        ".bz2": lambda: bz2.BZ2File(raw),
    }
    return cast(IO[bytes], openers[compression]()) if compression else raw


def _zstd(raw: IO[bytes]) -> Any:
    """Frame after frame. (The reader of the package zstandard takes a file cut short for one that ended.)"""
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"), READ_BYTES)
