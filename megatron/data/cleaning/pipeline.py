# SPDX-License-Identifier: Apache-2.0
"""Runs of stages without a barrier between them, and what passes documents on to the next run. Knows no stage by name."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import orjson

from megatron.data.cleaning.document import Document
from megatron.data.cleaning.pii import mask_text
from megatron.data.cleaning.stage import DocumentStage
from megatron.data.cleaning.stage_stats import StageStats

OUTPUT = "output"


class DocumentSource(Protocol):
    """Where a segment's documents come from."""

    def read(self, rank: int, stage_stats: StageStats) -> Iterator[Document]:
        """This task's documents, in order."""


@dataclass(frozen=True)
class Segment:
    """A source and stages; a step of an executor's pipeline.

    stage_stats: folder the counts go to, one file per task; mask: personal data is hidden in examples
    """

    source: DocumentSource
    stages: tuple[DocumentStage, ...]
    stage_stats: str
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
        stage_stats.save(Path(self.stage_stats) / f"{rank:05d}.json")


@dataclass(frozen=True)
class Store:
    """Step: writes documents for the next segment, and their lengths in characters."""

    folder: str

    def __call__(self, data: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        """Passes them on unchanged."""
        lengths = []
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{rank:05d}.jsonl").open("wb") as file:
            for document in data:
                file.write(document.pack())
                lengths.append(len(document.text))
                yield document
        np.save(folder / f"{rank:05d}.lengths.npy", np.array(lengths, dtype=np.int64))


@dataclass(frozen=True)
class Stored:
    """A source: what `Store` wrote, less the documents of a barrier's verdict.

    removed: folder of its .npy files of (task, index); stage, rule: what a drop is counted under
    """

    folder: str
    removed: str
    stage: str
    rule: str

    def read(self, rank: int, stage_stats: StageStats) -> Iterator[Document]:
        """This task's documents, in order."""
        gone = removed_of(Path(self.removed), rank)
        with (Path(self.folder) / f"{rank:05d}.jsonl").open("rb") as file:
            for index, line in enumerate(file):
                document = Document.unpack(line)
                stage_stats.entered(self.stage, len(document.text))
                if index in gone:
                    stage_stats.drop(self.stage, self.rule, document)
                else:
                    yield document


def removed_of(folder: Path, task: int) -> set[int]:
    """Numbers of a task's documents that are to go."""
    gone: set[int] = set()
    for path in sorted(folder.glob("*.npy")):
        pairs = np.load(path, allow_pickle=False)
        gone.update(pairs[pairs[:, 0] == task, 1].tolist())
    return gone


@dataclass(frozen=True)
class WriteLines:
    """Step: the cleaned documents as JSON lines, all fields as they came."""

    folder: str
    text_key: str
    stage_stats: str
    compress: bool = False

    def __call__(self, data: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        """Passes nothing on."""
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        stage_stats = StageStats()
        name = f"part-{rank:05d}.jsonl" + (".gz" if self.compress else "")
        with (folder / name).open("wb") as raw, _packed(raw, self.compress) as file:
            for document in data:
                document.record[self.text_key] = document.text
                file.write(orjson.dumps(document.record, option=orjson.OPT_APPEND_NEWLINE))
                stage_stats.entered(OUTPUT, len(document.text))
        stage_stats.save(Path(self.stage_stats) / f"{rank:05d}.json")
        return iter(())


def _packed(raw: IO[bytes], compress: bool) -> IO[bytes]:
    # Neither name nor time in the header: the same documents give the same bytes.
    return gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) if compress else io.BufferedWriter(raw)  # type: ignore[return-value]
