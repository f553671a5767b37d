# SPDX-License-Identifier: Apache-2.0
"""Input files of a cleaning run, their division into tasks, and their records one at a time.

JSON lines, compressed or not, and Parquet, read by the reader of the data tools. Tasks get neighbouring files, and parts of large plain
files, so that the tasks' outputs one after the other are in the order of the input.
"""

from __future__ import annotations

import glob
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson

from megatron.data.cleaning.document import Document, StageStats
from megatron.data.preprocess.blocks import ArrowBlock, BlockStart, SourceBlock
from megatron.data.preprocess.inputs import FileKind, find, kind_of, open_compressed
from megatron.data.preprocess.sources import Files, line_blocks
from megatron.errors import DataError

READABLE = ".jsonl, .json, .ndjson (also .gz, .zst, .xz, .bz2) and .parquet"
STAGE = "read"


@dataclass(frozen=True)
class ByteRange:
    """Bytes [start, end) of a file; end None: to its end. A line belongs to the piece its first byte lies in."""

    path: str
    start: int = 0
    end: int | None = None


def find_inputs(given: Sequence[str]) -> list[Path]:
    """Files of files, folders (searched to the bottom) and patterns; each once, in the order given, folders sorted."""
    found: dict[Path, None] = {}
    for name in given:
        path = Path(name)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and _known(file))
        else:
            matches = [path] if path.is_file() else sorted(map(Path, glob.glob(name, recursive=True)))
            files = [match for match in matches if match.is_file()]
        if not files:
            raise DataError(f"{name} gives no input file", where=name, fix=f"name {READABLE} files, or their folder")
        for file in files:
            if not _known(file):
                raise DataError(f"{file} is of no known kind", where=str(file), fix=f"known: {READABLE}")
            found.setdefault(file)
    return list(found)


def _known(path: Path) -> bool:
    kind = kind_of(path.name)
    return kind is not None and kind[0] in (FileKind.LINES, FileKind.PARQUET)


def divide(files: Sequence[Path], tasks: int) -> list[list[ByteRange]]:
    """`tasks` lists of neighbouring pieces of about the same number of bytes; some are empty when there is too little to divide.

    >>> divide([], 2)
    [[], []]
    """
    sizes = [file.stat().st_size for file in files]
    total = sum(sizes)
    borders = [total * task // tasks for task in range(tasks + 1)]
    parts: list[list[ByteRange]] = [[] for _ in range(tasks)]
    before = 0
    for file, size in zip(files, sizes, strict=True):
        if kind_of(file.name) == (FileKind.LINES, ""):
            for task, (low, high) in enumerate(pairwise(borders)):
                start, end = max(low - before, 0), min(high - before, size)
                if start < end:
                    parts[task].append(ByteRange(str(file), start, end))
        else:
            # Compressed files and Parquet are read whole, by the task their middle falls to.
            middle = before + size / 2
            parts[min(max(bisect_right(borders, middle) - 1, 0), tasks - 1)].append(ByteRange(str(file)))
        before += size
    return parts


@dataclass(frozen=True)
class Reader:
    """Source of a pipeline: the documents of this task's pieces.

    pieces: per task; text_key: the field that holds the text; skip_bad: so many lines that are no records are dropped, one more is an error
    """

    pieces: tuple[tuple[ByteRange, ...], ...]
    text_key: str
    skip_bad: int

    def read(self, rank: int, stage_stats: StageStats) -> Iterator[Document]:
        """Documents in order. Records that cannot be used are dropped and counted."""
        bad = 0
        for piece in self.pieces[rank]:
            for at, record in records(piece):
                document = self._document(record, at)
                if isinstance(document, Document):
                    stage_stats.entered(STAGE, len(document.text))
                    yield document
                    continue
                stage_stats.entered(STAGE, 0)
                stage_stats.drop(STAGE, "bad record", Document("", at), document)
                bad += 1
                if bad > self.skip_bad:
                    raise DataError(
                        f"a record cannot be used: {document}",
                        where=at,
                        fix="fix the file, or allow some with --skip-bad N (they are counted)",
                    )

    def _document(self, record: dict[str, Any] | str, at: str) -> Document | str:
        """The document of a record, or what is wrong with it."""
        if isinstance(record, str):
            return record
        text = record.get(self.text_key)
        if not isinstance(text, str):
            return f"no text under {self.text_key!r} (found: {', '.join(map(str, record))[:200]})"
        # The key keeps its place among the others.
        record[self.text_key] = None
        return Document(text, at, record)


def records(piece: ByteRange) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(file:line, record), or in place of the record what is wrong with it; each byte of the file is read once.

    Lines of a piece that does not begin with its file are counted from there, and their place is shown as "file from byte N:line".
    """
    for block in _blocks(piece):
        read = block.read()
        found: list[tuple[int, dict[str, Any] | str]] = [*zip(read.numbers, read.records, strict=True), *read.faults]
        for number, record in sorted(found, key=lambda one: one[0]):
            if isinstance(block, ArrowBlock) and isinstance(record, dict):
                record = _plain(record)
            yield block.label(number), record


def _blocks(piece: ByteRange) -> Iterator[SourceBlock]:
    path = Path(piece.path)
    if piece.end is None:
        yield from Files(find(path)).blocks(BlockStart())
        return
    with path.open("rb") as file:
        # A line that began before the piece belongs to the piece before.
        file.seek(max(piece.start - 1, 0))
        start = piece.start - 1 + len(file.readline()) if piece.start else 0
    if start >= piece.end:
        return
    where = f"{path} from byte {start}" if start else path
    yield from line_blocks(open_compressed(path, ""), where, BlockStart(0, start, 0), raw=None, stop=piece.end)


def _plain(record: dict[str, Any]) -> dict[str, Any] | str:
    """A row whose values pass through JSON unchanged, or what stands in the way."""
    try:
        back = orjson.loads(orjson.dumps(record))
    except TypeError as error:
        return f"a column cannot be kept: {error}"
    return record if back == record else "a column cannot be kept: its values (dates, say) are no JSON values"
