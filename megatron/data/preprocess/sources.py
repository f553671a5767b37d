# SPDX-License-Identifier: Apache-2.0
"""Sources of records: files of every kind, and records made here. They give blocks, from any position on."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

from megatron.data.fingerprint import sizes_and_digests
from megatron.data.preprocess.blocks import ArrowBlock, BlockStart, LineBlock, RecordBlock, SourceBlock, TextBlock
from megatron.data.preprocess.inputs import DAMAGED, FileKind, InputFile, kind_of, open_compressed, reader
from megatron.errors import DataError

BLOCK_BYTES = 1 << 20
BLOCK_RECORDS = 256
BLOCK_FILES = 64
ROWS = 1024  # rows decoded of a Parquet file at once
BOM = b"\xef\xbb\xbf"
BROKEN = (*DAMAGED, zipfile.BadZipFile, tarfile.TarError)


@dataclass(frozen=True)
class MadeHere:
    """Records made by a function of this process. name: tells them from others; version: changes when they do"""

    name: str
    make: Callable[[], Iterable[dict[str, Any]]]
    version: str = ""
    total_bytes: int | None = field(default=None, init=False)

    def facts(self) -> list[dict[str, Any]]:
        """Name and version."""
        return [{"name": self.name, "version": self.version}]

    def blocks(self, start: BlockStart) -> Iterator[SourceBlock]:
        """BLOCK_RECORDS records each."""
        stream, number = iter(self.make()), start.offset
        next(islice(stream, number, number), None)
        while records := list(islice(stream, BLOCK_RECORDS)):
            yield RecordBlock(
                where=self.name, first=number + 1, after=BlockStart(0, number + len(records), number + len(records)), payload=records
            )
            number += len(records)


@dataclass(frozen=True)
class Files:
    """Records in files.

    columns: of tables, those that are read; None = all
    lenient: bytes of plain text that are not UTF-8 become U+FFFD
    """

    files: Sequence[InputFile]
    columns: tuple[str, ...] | None = None
    lenient: bool = False

    @property
    def total_bytes(self) -> int | None:
        """Size of all files."""
        return sum(file.path.stat().st_size for file in self.files)

    def facts(self) -> list[dict[str, Any]]:
        """Path, size and digest of every file; of large files, or where there is much, a digest of parts."""
        paths = [file.path for file in self.files]
        return [{"path": str(path), **known} for path, known in zip(paths, sizes_and_digests(paths), strict=True)]

    def blocks(self, start: BlockStart) -> Iterator[SourceBlock]:
        """About BLOCK_BYTES each, none across two files but for small plain texts. Raises DataError for damaged files."""
        number = start.file
        while number < len(self.files):
            file = self.files[number]
            begin = start if number == start.file else BlockStart(number)
            try:
                if file.kind is FileKind.TEXT:
                    block = self._text_block(number)
                    yield block
                    number += len(block.payload)
                    continue
                yield from self._read(file, begin)
            except (*BROKEN, OSError) as error:
                if isinstance(error, OSError) and error.errno:
                    raise DataError(f"cannot be read: {error.strerror}", where=str(file.path), fix="check file and rights") from error
                raise DataError(
                    f"the file is damaged or cut short: {error}", where=str(file.path), fix="download or compress it again"
                ) from error
            number += 1

    def _read(self, file: InputFile, begin: BlockStart) -> Iterator[SourceBlock]:
        if file.kind is FileKind.LINES:
            yield from line_blocks(open_compressed(file.path, file.compression), file.path, begin, raw=None)
        elif file.kind in (FileKind.PARQUET, FileKind.ARROW):
            yield from table_blocks(file, begin, self.columns)
        else:
            yield from archive_blocks(file, begin, self.lenient)

    def _text_block(self, number: int) -> TextBlock:
        """As many plain texts from this one on as make one block."""
        payload: list[tuple[str, bytes]] = []
        size = 0
        for file in self.files[number : number + BLOCK_FILES]:
            more = file.path.stat().st_size
            if file.kind is not FileKind.TEXT or (size and size + more > BLOCK_BYTES):
                break
            with open_compressed(file.path, file.compression)[0] as content:
                payload.append((str(file.path), content.read()))
            size += more
        after = BlockStart(number + len(payload))
        return TextBlock(where=payload[0][0], source_bytes=size, after=after, payload=payload, lenient=self.lenient)


Opened = tuple[IO[bytes], IO[bytes]]  # the content, and the file as it lies on disk


def line_blocks(opened: Opened, path: Path | str, begin: BlockStart, *, raw: int | None, stop: int | None = None) -> Iterator[SourceBlock]:
    """Blocks of whole lines.

    raw:  bytes of the input that the whole content took, where the file on disk does not say (a member of an archive)
    stop: the last line is the one that holds the byte before this one; None = to the end
    """
    content, disk = opened
    file, offset, line = begin
    with content, disk:
        _skip(content, disk, offset)
        rest, told = b"", disk.tell() if raw is None and offset else 0
        while True:
            left = BLOCK_BYTES if stop is None else stop - offset - len(rest)
            # Behind `stop`, what is missing of its line is all that is read.
            chunk = content.read(min(left, BLOCK_BYTES)) if left > 0 else content.readline() if rest else b""
            if offset == 0 and not rest and chunk.startswith(BOM):
                chunk, offset = chunk[len(BOM) :], len(BOM)
            data = rest + chunk
            # A line longer than a block is gathered until it ends.
            cut = len(data) if not chunk else data.rfind(b"\n") + 1
            rest = data[cut:]
            if cut:
                now = disk.tell() if raw is None else told
                lines = data.count(b"\n", 0, cut)
                offset += cut
                yield LineBlock(
                    where=str(path),
                    first=line + 1,
                    source_bytes=max(now - told, 0),
                    after=BlockStart(file, offset, line + lines),
                    payload=data[:cut],
                )
                line, told = line + lines, now
            if not chunk:
                return


def _skip(content: IO[bytes], disk: IO[bytes], offset: int) -> None:
    if content is disk:
        content.seek(offset)
        return
    while offset:
        read = len(content.read(min(offset, BLOCK_BYTES)))
        if not read:
            return
        offset -= read


def table_blocks(file: InputFile, begin: BlockStart, columns: Sequence[str] | None) -> Iterator[SourceBlock]:
    """Blocks of rows of a Parquet or Arrow file."""
    import pyarrow as pa

    left, row = file.path.stat().st_size, 0
    size = left
    try:
        for batch, rows in _batches(file, columns):
            if row + batch.num_rows <= begin.offset:
                row += batch.num_rows
                continue
            if row < begin.offset:
                batch, row = batch.slice(begin.offset - row), begin.offset
            step = max(1, int(batch.num_rows * BLOCK_BYTES / max(batch.nbytes, 1)))
            for start in range(0, batch.num_rows, step):
                part = batch.slice(start, step)
                sink = io.BytesIO()
                with pa.ipc.new_stream(sink, part.schema) as writer:
                    writer.write_batch(part)
                row += part.num_rows
                took = min(left, size * part.num_rows // rows if rows else part.nbytes)
                left -= took
                yield ArrowBlock(
                    where=str(file.path),
                    first=row - part.num_rows + 1,
                    source_bytes=took,
                    after=BlockStart(begin.file, row, row),
                    payload=sink.getvalue(),
                )
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"the {file.kind.value} file is damaged: {error}", where=str(file.path), fix="download it again") from error


def _batches(file: InputFile, columns: Sequence[str] | None) -> Iterator[tuple[Any, int]]:
    """Record batches, and the number of rows of the file where it is known, else 0."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.kind is FileKind.PARQUET:
        with pq.ParquetFile(file.path) as parquet:
            chosen = _chosen(parquet.schema_arrow.names, columns)
            for batch in parquet.iter_batches(batch_size=ROWS, columns=chosen):
                yield batch, parquet.metadata.num_rows
        return
    with pa.memory_map(str(file.path)) as mapped:
        try:
            reader: Any = pa.ipc.open_stream(mapped)
            batches: Iterable[Any] = reader
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(mapped)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        chosen = _chosen(reader.schema.names, columns)
        for batch in batches:
            yield (batch if chosen is None else batch.select(chosen)), 0


def _chosen(names: Sequence[str], columns: Sequence[str] | None) -> list[str] | None:
    # A wanted column that is absent is the encoder's fault to tell, record by record, so all are read then.
    return [name for name in columns if name in names] if columns and any(name in names for name in columns) else None


def archive_blocks(file: InputFile, begin: BlockStart, lenient: bool) -> Iterator[SourceBlock]:
    """The members of a zip (sorted by name) or tar (as they come): JSON lines, or one text each."""
    size = file.path.stat().st_size
    members = _zip_members(file.path) if file.kind is FileKind.ZIP else _tar_members(file.path)
    for number, (name, share, content) in enumerate(members):
        if number < begin.offset:
            continue
        where, known = f"{file.path}!{name}", kind_of(name)
        after = BlockStart(begin.file, number + 1)
        if known is not None and known[0] is FileKind.LINES:
            blocks = list(line_blocks((reader(io.BytesIO(content), known[1]), io.BytesIO()), where, BlockStart(), raw=0))
            yield from (replace(block, after=None) for block in blocks[:-1])
            if blocks:
                yield replace(blocks[-1], after=after, source_bytes=int(size * share))
        else:
            yield TextBlock(where=where, source_bytes=int(size * share), after=after, payload=[(where, content)], lenient=lenient)


def _zip_members(path: Path) -> Iterator[tuple[str, float, bytes]]:
    with zipfile.ZipFile(path) as archive:
        members = sorted((info for info in archive.infolist() if not info.is_dir()), key=lambda info: info.filename)
        total = sum(info.compress_size for info in members) or 1
        for info in members:
            yield info.filename, info.compress_size / total, archive.read(info)


def _tar_members(path: Path) -> Iterator[tuple[str, float, bytes]]:
    content, raw = open_compressed(path, ".zst" if path.suffix == ".zst" else "")  # tarfile finds out the other compressions itself
    with raw, content, tarfile.open(fileobj=content, mode="r|*") as archive:
        for info in archive:
            member = archive.extractfile(info) if info.isfile() else None
            if member is not None:
                yield info.name, 0.0, member.read()
