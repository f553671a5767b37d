# SPDX-License-Identifier: Apache-2.0
"""JSON files that hold one array of records, a Source. A file is read whole: JSON lines are the form for large data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron.data.preprocess.blocks import BlockStart, RecordBlock, SourceBlock
from megatron.data.preprocess.inputs import FileKind, InputFile
from megatron.data.preprocess.sources import BLOCK_RECORDS, BOM, Files
from megatron.errors import DataError

LOOKED_AT = 4096


@dataclass(frozen=True)
class Arrays:
    """The records of all arrays."""

    files: Sequence[InputFile]

    @property
    def total_bytes(self) -> int | None:
        """Size of all files."""
        return Files(self.files).total_bytes

    def facts(self) -> list[dict[str, Any]]:
        """Path, size and digest of every file."""
        return Files(self.files).facts()

    def blocks(self, start: BlockStart) -> Iterator[SourceBlock]:
        """BLOCK_RECORDS records each. Raises DataError for what is no array of objects."""
        for number in range(start.file, len(self.files)):
            path = self.files[number].path
            records = _records(path)
            size = path.stat().st_size
            for first in range(start.offset if number == start.file else 0, len(records), BLOCK_RECORDS):
                part = records[first : first + BLOCK_RECORDS]
                end = first + len(part)
                yield RecordBlock(
                    where=str(path),
                    first=first + 1,
                    source_bytes=size * end // len(records) - size * first // len(records),
                    after=BlockStart(number, end, end),
                    payload=part,
                )


def is_array(file: InputFile) -> bool:
    """Whether a file of JSON lines begins with a bracket, and so holds an array."""
    if file.kind is not FileKind.LINES or file.compression:
        return False
    with file.path.open("rb") as content:
        return content.read(LOOKED_AT).removeprefix(BOM).lstrip().startswith(b"[")


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        records = orjson.loads(path.read_bytes().removeprefix(BOM))
    except (OSError, orjson.JSONDecodeError) as error:
        raise DataError(f"the JSON array cannot be read: {error}", where=str(path), fix="fix the file, or write JSON lines") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError("not an array of JSON objects", where=str(path), fix="one object per record is wanted")
    return records
