# SPDX-License-Identifier: Apache-2.0
"""Runs of stages without a barrier between them, what passes documents on to the next run, and the output with its report.

The functions with `data`, `rank` and `world_size` are steps of an executor's pipeline.
"""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import orjson

from megatron.data.cleaning.document import Document, DocumentStage, StageStats, merged, new_file
from megatron.data.cleaning.pii import mask_text
from megatron.data.cleaning.sources import STAGE as READ
from megatron.errors import DataError

OUTPUT = "output"
REPORT = "report.json"
VERSION = 1
BATCH_RECORDS = 1000


class DocumentSource(Protocol):
    """Where a segment's documents come from."""

    def read(self, rank: int, stage_stats: StageStats) -> Iterator[Document]:
        """This task's documents, in order."""


@dataclass(frozen=True)
class Segment:
    """A source and stages; a step.

    stage_stats: folder the counts go to, one file per task; mask: personal data is hidden in examples
    """

    source: DocumentSource
    stages: tuple[DocumentStage, ...]
    stage_stats: Path
    mask: bool = False

    def __call__(self, data: object, rank: int, world_size: int) -> Iterator[Document]:
        """The documents that every stage kept."""
        stage_stats = StageStats(mask_text if self.mask else None)
        judges = [(stage.name, stage.open(stage_stats)) for stage in self.stages]
        for document in self.source.read(rank, stage_stats):
            for name, judge in judges:
                stage_stats.entered(name, len(document.text))
                verdict = judge(document)
                if verdict is not None:
                    rule, note = (verdict, "") if isinstance(verdict, str) else verdict
                    stage_stats.drop(name, rule, document, note)
                    break
            else:
                yield document
        stage_stats.save(new_file(self.stage_stats, f"{rank:05d}.json"))


def store(data: Iterable[Document], rank: int, world_size: int, *, folder: Path) -> Iterator[Document]:
    """Write documents for the next segment, and their lengths in characters. They pass unchanged."""
    lengths = []
    with new_file(folder / "documents", f"{rank:05d}.jsonl").open("wb") as file:
        for document in data:
            file.write(document.pack())
            lengths.append(len(document.text))
            yield document
    np.save(folder / "documents" / f"{rank:05d}.lengths.npy", np.array(lengths, dtype=np.int64))


@dataclass(frozen=True)
class Stored:
    """A source: what `store` wrote, less the documents of a barrier's verdict. stage, rule: what a drop is counted under"""

    folder: Path
    stage: str
    rule: str

    def read(self, rank: int, stage_stats: StageStats) -> Iterator[Document]:
        """This task's documents, in order."""
        gone = removed_of(self.folder, rank)
        with (self.folder / "documents" / f"{rank:05d}.jsonl").open("rb") as file:
            for index, line in enumerate(file):
                document = Document.unpack(line)
                stage_stats.entered(self.stage, len(document.text))
                if index in gone:
                    stage_stats.drop(self.stage, self.rule, document)
                else:
                    yield document


def removed_of(folder: Path, task: int) -> set[int]:
    """Numbers of a task's documents that are to go, as the last step of a stage with a barrier wrote them."""
    gone: set[int] = set()
    for path in sorted((folder / "removed").glob("*.npy")):
        pairs = np.load(path, allow_pickle=False)
        gone.update(pairs[pairs[:, 0] == task, 1].tolist())
    return gone


def write_lines(
    data: Iterable[Document], rank: int, world_size: int, *, folder: Path, text_key: str, stage_stats: Path, compress: bool = False
) -> None:
    """Write the cleaned documents as JSON lines, all fields as they came."""
    counts = StageStats()
    name = f"part-{rank:05d}.jsonl" + (".gz" if compress else "")
    with new_file(folder, name).open("wb") as raw, _packed(raw, compress) as file:
        for document in data:
            document.record[text_key] = document.text
            file.write(orjson.dumps(document.record, option=orjson.OPT_APPEND_NEWLINE))
            counts.entered(OUTPUT, len(document.text))
    counts.save(new_file(stage_stats, f"{rank:05d}.json"))


def _packed(raw: IO[bytes], compress: bool) -> IO[bytes]:
    # Neither name nor time in the header: the same documents give the same bytes.
    return gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) if compress else io.BufferedWriter(raw)  # type: ignore[return-value]


def _batches(path: Path) -> Iterator[list[dict[str, Any]]]:
    with path.open("rb") as file:
        while batch := [orjson.loads(line) for line in islice(file, BATCH_RECORDS)]:
            yield batch


@contextmanager
def _one_schema(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise DataError(
            f"fields of the records are of different types: {error}",
            where=str(path),
            fix="write JSON lines (--format jsonl), which take any record",
        ) from error


def gather_schema(data: object, rank: int, world_size: int, *, work: Path) -> None:
    """Write the schema of a task's lines. All records are read: a field may be empty in the first thousands."""
    import pyarrow

    schema = pyarrow.schema([])
    path = work / "lines" / f"part-{rank:05d}.jsonl"
    with _one_schema(path):
        for batch in _batches(path):
            schema = pyarrow.unify_schemas([schema, pyarrow.Table.from_pylist(_all_keys(batch)).schema], promote_options="permissive")
    new_file(work / "schemas", f"{rank:05d}.schema").write_bytes(schema.serialize().to_pybytes())


def _all_keys(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # pyarrow takes the columns from the first record alone.
    keys = {key: None for record in batch for key in record}
    return [keys | record for record in batch]


def write_parquet(data: object, rank: int, world_size: int, *, work: Path) -> None:
    """Write a task's lines under the schema of all tasks; a task without records writes no file."""
    import pyarrow
    import pyarrow.parquet

    found = [pyarrow.ipc.read_schema(pyarrow.py_buffer(path.read_bytes())) for path in sorted((work / "schemas").glob("*.schema"))]
    path = work / "lines" / f"part-{rank:05d}.jsonl"
    shard = new_file(work / OUTPUT, f"part-{rank:05d}.parquet")
    if not path.stat().st_size:
        return
    with _one_schema(path):
        schema = pyarrow.unify_schemas(found, promote_options="permissive")
        with pyarrow.parquet.ParquetWriter(shard, schema, compression="zstd") as writer:
            for batch in _batches(path):
                writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))


def publish(
    data: object, rank: int, world_size: int, *, work: Path, output: Path, said: dict[str, Any], stats_folders: tuple[Path, ...]
) -> None:
    """Of one task: remove shards without a document, write the report, and rename the folder whole.

    said: settings and what else the report repeats; stats_folders: folders with counts, in the order of the stages
    """
    made = work / OUTPUT
    if not made.exists():
        return  # a run that was killed after this step's rename, before it was marked complete
    stage_stats = merged(path for folder in stats_folders for path in sorted(folder.glob("*.json")))
    shards = sorted(made.glob("part-*"))
    kept = [shard for shard in shards if shard.stat().st_size and not _empty_gzip(shard)] or shards[:1]
    for shard in set(shards) - set(kept):
        shard.unlink()
    report = orjson.dumps(_report(stage_stats, said, kept), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    (made / REPORT).write_bytes(report)
    os.replace(made, output)


def _empty_gzip(shard: Path) -> bool:
    if shard.suffix != ".gz":
        return False
    with shard.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        return file.read() == bytes(4)  # FORMAT: a gzip file ends with the length of its contents modulo 2**32


def _report(stage_stats: StageStats, said: dict[str, Any], shards: list[Path]) -> dict[str, Any]:
    """What became of the documents. The same input and settings give the same report."""
    dropped_by_rule = {key: entry["count"] for key, entry in sorted(stage_stats.dropped.items())}
    bad = stage_stats.dropped[f"{READ}/bad record"]
    counted = dict(stage_stats.stages)
    came = counted.pop(READ, {"documents": 0, "characters": 0})
    left = counted.pop(OUTPUT, {"documents": 0, "characters": 0})
    stages = []
    for name, counts in counted.items():
        rules = {key.split("/", 1)[1]: entry for key, entry in stage_stats.dropped.items() if key.startswith(f"{name}/")}
        dropped = sum(entry["count"] for entry in rules.values())
        found = {
            "stage": name,
            "documents_in": counts["documents"],
            "documents_out": counts["documents"] - dropped,
            "changed": dict(sorted(stage_stats.changed[name].items())),
            "dropped": dict(sorted(rules.items())),
            "examples": stage_stats.examples[name],
        }
        stages.append(found)
    return {
        "version": VERSION,
        "input": {**said["input"], "documents": came["documents"], "bad_records": bad},
        "output": {**left, "files": [shard.name for shard in shards]},
        "dropped": dropped_by_rule,
        "stages": stages,
        "settings": {name: value for name, value in said.items() if name != "input"},
    }
