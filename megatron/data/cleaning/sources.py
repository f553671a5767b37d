# SPDX-License-Identifier: Apache-2.0
"""Input files of a cleaning run, their division into tasks, and their records one at a time. Knows no stage.

JSON lines (plain, .gz, .zst, .xz) and Parquet. Tasks get neighbouring files, and parts of large plain files, so that the tasks' outputs one
after the other are in the order of the input.
"""

from __future__ import annotations

import glob
import gzip
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from megatron.data.cleaning.document import Document
from megatron.data.cleaning.stage_stats import StageStats
from megatron.errors import DataError

JSON_LINES = (".jsonl", ".json", ".ndjson")
COMPRESSED = (".gz", ".zst", ".xz")
BLOCK_BYTES = 1 << 22
STAGE = "read"


@dataclass(frozen=True)
class ByteRange:
    """Bytes [start, end) of a file; end None: to its end. A line belongs to the piece its first byte lies in."""

    path: str
    start: int = 0
    end: int | None = None


def is_parquet(path: Path) -> bool:
    """Whether a file is read as Parquet."""
    return path.suffix in (".parquet", ".pq")


def _known(path: Path) -> bool:
    inner = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    return inner in JSON_LINES or is_parquet(path)


def find_inputs(given: Sequence[str]) -> list[Path]:
    """Files of files, folders (searched to the bottom) and patterns; each once, in the order given, folders sorted."""
    found: dict[Path, None] = {}
    for name in given:
        path = Path(name)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and _known(file))
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(match) for match in glob.glob(name, recursive=True) if Path(match).is_file())
        if not files:
            raise DataError(
                f"{name} gives no input file", where=name, fix="name .jsonl (.gz, .zst, .xz) or .parquet files, or their folder"
            )
        for file in files:
            if not _known(file):
                raise DataError(f"{file} is of no known kind", where=str(file), fix="known: .jsonl (.gz, .zst, .xz), .parquet")
            found.setdefault(file)
    return list(found)


def divide(files: Sequence[Path], tasks: int) -> list[list[ByteRange]]:
    """`tasks` lists of neighbouring pieces of about the same number of bytes; some are empty when there is too little to divide."""
    sizes = [file.stat().st_size for file in files]
    share = max(sum(sizes) / tasks, 1)
    parts: list[list[ByteRange]] = [[] for _ in range(tasks)]
    before = 0
    for file, size in zip(files, sizes, strict=True):
        if file.suffix in JSON_LINES:
            start = 0
            while start < size or size == 0:
                task = min(int((before + start) / share), tasks - 1)
                limit = size if task == tasks - 1 else min(size, max(start + 1, round((task + 1) * share) - before))
                parts[task].append(ByteRange(str(file), start, limit))
                start = limit
                if size == 0:
                    break
        else:
            # Compressed files and Parquet are read whole, by the task their middle falls to.
            parts[min(int((before + size / 2) / share), tasks - 1)].append(ByteRange(str(file)))
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
            for at, size, record in records(piece):
                stage_stats.entered(STAGE, size)
                reason, document = self._document(record, at)
                if document is not None:
                    yield document
                    continue
                stage_stats.drop(STAGE, "bad record", Document("", at), reason)
                bad += 1
                if bad > self.skip_bad:
                    raise DataError(
                        f"a record cannot be used: {reason}",
                        where=at,
                        fix="fix the file, or allow some with --skip-bad N (they are counted)",
                    )

    def _document(self, record: dict[str, Any] | str, at: str) -> tuple[str, Document | None]:
        if isinstance(record, str):
            return record, None
        text = record.get(self.text_key)
        if not isinstance(text, str):
            names = ", ".join(map(str, record))[:200]
            return f"no text under {self.text_key!r} (found: {names})", None
        # The key keeps its place among the others.
        record[self.text_key] = None
        return "", Document(text, at, record)

    def settings(self) -> list[list[dict[str, Any]]]:
        """What identifies the division."""
        return [[asdict(piece) for piece in part] for part in self.pieces]


def records(piece: ByteRange) -> Iterator[tuple[str, int, dict[str, Any] | str]]:
    """(file:line, bytes, record), or in place of the record what is wrong with it."""
    path = Path(piece.path)
    if is_parquet(path):
        yield from _parquet_records(path)
        return
    with _open(path) as lines:
        try:
            for number, line in _lines(lines, piece):
                if not line.strip():
                    continue
                yield f"{path}:{number}", len(line), _parse(line)
        except (EOFError, OSError, lzma.LZMAError) as error:
            raise DataError(
                f"{path} cannot be read to its end: {error}", where=str(path), fix="the file is damaged: get it again"
            ) from error


def _parse(line: bytes) -> dict[str, Any] | str:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return f"not JSON: {error}"
    return record if isinstance(record, dict) else f"not a JSON object but a {type(record).__name__}"


def _lines(file: IO[bytes], piece: ByteRange) -> Iterator[tuple[int, bytes]]:
    number = 1
    if piece.start:
        # Lines before the piece are counted for the examples' sake. A line that began before it belongs to the piece before.
        left = piece.start - 1
        while left and (block := file.read(min(left, BLOCK_BYTES))):
            number += block.count(b"\n")
            left -= len(block)
        file.readline()
        number += 1
    position = file.tell() if piece.end is not None else 0
    while piece.end is None or position < piece.end:
        line = file.readline()
        if not line:
            return
        yield number, line
        number += 1
        position += len(line)


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    if path.suffix == ".zst":
        import io

        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True))
    return path.open("rb")


def _parquet_records(path: Path) -> Iterator[tuple[str, int, dict[str, Any] | str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        row = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path}:{row}", 0, _plain(record)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}", where=str(path), fix="the file is damaged: get it again") from error


def _plain(record: dict[str, Any]) -> dict[str, Any] | str:
    """A row whose values pass through JSON unchanged, or what stands in the way."""
    try:
        back = orjson.loads(orjson.dumps(record))
    except TypeError as error:
        return f"a column cannot be kept: {error}"
    return record if back == record else "a column cannot be kept: its values (dates, say) are no JSON values"
