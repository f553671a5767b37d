# SPDX-License-Identifier: Apache-2.0
"""Cleaned JSON lines into Parquet shards of one schema. Knows no stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from megatron.errors import DataError

BATCH_RECORDS = 1000
WHY = "fields of the records are of different types: {error}"
FIX = "write JSON lines (--format jsonl), which take any record"


def _batches(path: Path) -> Iterator[list[dict[str, Any]]]:
    with path.open("rb") as file:
        while batch := [orjson.loads(line) for line in islice(file, BATCH_RECORDS)]:
            yield batch


@dataclass(frozen=True)
class GatherSchema:
    """Step: writes the schema of a task's lines."""

    lines: str
    schemas: str

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """Reads all records: a field may be empty in the first thousands."""
        import pyarrow

        schema = pyarrow.schema([])
        path = Path(self.lines) / f"part-{rank:05d}.jsonl"
        try:
            for batch in _batches(path):
                schema = pyarrow.unify_schemas([schema, pyarrow.Table.from_pylist(_all_keys(batch)).schema], promote_options="permissive")
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise DataError(WHY.format(error=error), where=str(path), fix=FIX) from error
        folder = Path(self.schemas)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{rank:05d}.schema").write_bytes(schema.serialize().to_pybytes())


def _all_keys(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # pyarrow takes the columns from the first record alone.
    keys = {key: None for record in batch for key in record}
    return [keys | record for record in batch]


@dataclass(frozen=True)
class WriteParquet:
    """Step: writes a task's lines under the schema of all tasks."""

    lines: str
    schemas: str
    output: str

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """A task without records writes no file."""
        import pyarrow
        import pyarrow.parquet

        found = [pyarrow.ipc.read_schema(pyarrow.py_buffer(path.read_bytes())) for path in sorted(Path(self.schemas).glob("*.schema"))]
        path = Path(self.lines) / f"part-{rank:05d}.jsonl"
        folder = Path(self.output)
        folder.mkdir(parents=True, exist_ok=True)
        if not path.stat().st_size:
            return
        try:
            schema = pyarrow.unify_schemas(found, promote_options="permissive")
            with pyarrow.parquet.ParquetWriter(folder / f"part-{rank:05d}.parquet", schema, compression="zstd") as writer:
                for batch in _batches(path):
                    writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise DataError(WHY.format(error=error), where=str(path), fix=FIX) from error
