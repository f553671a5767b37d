# SPDX-License-Identifier: Apache-2.0
"""A block: some records on their way from an input to an encoder, still as bytes; what gives blocks; and the texts that they hold."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, Protocol

import orjson

from megatron.errors import DataError

SHOWN_KEYS = 12
FIRST_RECORDS = 64
FIRST_CHARACTERS = 1 << 17


class BlockStart(NamedTuple):
    """Where a block begins.

    file:   number of the input
    offset: bytes of its (decompressed) content, or rows, or records before it
    record: lines before it
    """

    file: int = 0
    offset: int = 0
    record: int = 0


@dataclass(frozen=True)
class Records:
    """Records read, and what could not be read.

    records: one dict each
    numbers: number of each record in its input
    faults:  (number, what is wrong) of lines that are no records
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    faults: list[tuple[int, str]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class SourceBlock(ABC):
    """Records that lie side by side in one input.

    where:        the input, as shown in errors
    first:        number of its first line, row or record, from 1
    source_bytes: bytes of the input that it took, compressed where that is; for progress
    after:        where the next block begins; None where reading cannot go on from there later
    """

    where: str
    first: int = 1
    source_bytes: int = 0
    after: BlockStart | None

    @abstractmethod
    def read(self) -> Records:
        """The records. Faults are returned, never raised."""

    def label(self, number: int) -> str:
        """`file:line` of a record."""
        return f"{self.where}:{number}"


@dataclass(frozen=True, kw_only=True)
class LineBlock(SourceBlock):
    """JSON lines, cut at a line's end."""

    payload: bytes

    def read(self) -> Records:
        """One JSON object per line; blank lines are skipped."""
        found = Records()
        for number, line in enumerate(self.payload.split(b"\n"), self.first):
            if not line or line.isspace():
                continue
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                found.faults.append((number, f"not JSON: {error}"))
                continue
            if isinstance(record, dict):
                found.records.append(record)
                found.numbers.append(number)
            else:
                found.faults.append((number, f"a JSON {type(record).__name__} and not an object: one {{...}} per line is wanted"))
        return found


@dataclass(frozen=True, kw_only=True)
class TextBlock(SourceBlock):
    """Whole texts: (name, UTF-8 bytes) each; every one is a record {"text": ...}.

    lenient: bytes that are not UTF-8 become U+FFFD instead of a fault
    """

    payload: Sequence[tuple[str, bytes]]
    lenient: bool = False

    def read(self) -> Records:
        """One record per text."""
        found = Records()
        for number, (_, content) in enumerate(self.payload, self.first):
            try:
                text = content.decode("utf-8-sig", errors="replace" if self.lenient else "strict")
            except UnicodeDecodeError as error:
                found.faults.append((number, f"not UTF-8: {error.reason} at byte {error.start}"))
                continue
            found.records.append({"text": text})
            found.numbers.append(number)
        return found

    def label(self, number: int) -> str:
        """The name of the text."""
        return self.payload[number - self.first][0]


@dataclass(frozen=True, kw_only=True)
class ArrowBlock(SourceBlock):
    """Rows of a table as an Arrow IPC stream."""

    payload: bytes

    def read(self) -> Records:
        """One record per row."""
        import pyarrow as pa

        rows = pa.ipc.open_stream(io.BytesIO(self.payload)).read_all().to_pylist()
        return Records(rows, list(range(self.first, self.first + len(rows))))


@dataclass(frozen=True, kw_only=True)
class RecordBlock(SourceBlock):
    """Records made in this process."""

    payload: list[dict[str, Any]]

    def read(self) -> Records:
        """The records."""
        return Records(self.payload, list(range(self.first, self.first + len(self.payload))))


class RecordSource(Protocol):
    """Records in a fixed order."""

    @property
    def total_bytes(self) -> int | None:
        """Bytes of the input, for progress; None = not known."""

    def facts(self) -> list[dict[str, Any]]:
        """What tells this input from any other: plain values, one dict per file."""

    def blocks(self, start: BlockStart) -> Iterator[SourceBlock]:
        """The blocks from `start` on."""


def keys_of(record: Any) -> str:
    """The keys of a record, for an error.

    >>> keys_of({"title": 1, "body": 2})
    'title, body'
    """
    names = list(record) if isinstance(record, dict) else [type(record).__name__]
    return ", ".join(map(str, names[:SHOWN_KEYS])) + (", ..." if len(names) > SHOWN_KEYS else "")


def texts(source: RecordSource, key: str = "text") -> Iterator[str]:
    """The text under `key` of every record. Raises DataError naming file and line of one without, or that cannot be read."""
    for block in source.blocks(BlockStart()):
        read = block.read()
        if read.faults:
            number, what = read.faults[0]
            raise DataError(what, where=block.label(number), fix="fix or remove it")
        for number, record in zip(read.numbers, read.records, strict=True):
            if not isinstance(record.get(key), str):
                what = f"no text under {key!r} (found: {keys_of(record)})"
                raise DataError(what, where=block.label(number), fix="name the key that holds the text")
            yield record[key]


def first_texts(source: RecordSource, keys: Sequence[str]) -> list[str]:
    """What texts there are under `keys` in the first records; what cannot be read is passed over."""
    first = (record for block in source.blocks(BlockStart()) for record in block.read().records)
    found: list[str] = []
    for record in islice(first, FIRST_RECORDS):
        found += [record[key] for key in keys if isinstance(record.get(key), str)]
        if sum(map(len, found)) > FIRST_CHARACTERS:
            break
    return found
