# SPDX-License-Identifier: Apache-2.0
"""The folder of a dataset that is being written: its streams and its record of progress, how it is taken up again, and how its files
get their names.

    <prefix>.partial/journal.json   what was asked, how far it is, or what is being renamed
    <prefix>.partial/<stream>.*     values and sizes

The renaming is listed in the journal before it begins, so that a run killed during it is finished by the next.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from filelock import FileLock, Timeout

from megatron.atomic_io import atomic_write, write_durably
from megatron.data.indexed_dataset import data_file, index_file, map_values, write_index
from megatron.data.legacy_dataset import write_legacy_index
from megatron.data.preprocess.blocks import BlockStart
from megatron.data.preprocess.encoders import Ragged, StreamFormat
from megatron.errors import DataError
from megatron.log import get_logger

log = get_logger(__name__)

JOURNAL = "journal.json"
RECORD_EVERY_S = 2.0
STEP = 1 << 20  # documents, or values, handled at once when a stream is sealed


@dataclass
class Counts:
    """Records by what became of them.

    documents: of the first stream; trained: tokens with a label, None without labels; source_bytes: of the input, as it lies on disk
    notes: further counts of the encoder; first_dropped, first_bad: (file:line, why)
    """

    records: int = 0
    documents: int = 0
    bad: int = 0
    source_bytes: int = 0
    trained: int | None = None
    seconds: float = 0.0
    dropped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    first_dropped: list[tuple[str, str]] = field(default_factory=list)
    first_bad: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Journal:
    """The record of progress.

    asked:      digest of all that the bytes depend on
    position:   where reading goes on; done: nothing is left to read
    streams:    state of each stream, see `StreamFiles.state`
    publishing: (file in the folder, its name at the end), where all is written
    facts:      tokens and documents of each stream
    """

    asked: str
    position: BlockStart = BlockStart()
    done: bool = False
    streams: dict[str, Any] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    publishing: list[tuple[str, str]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def stream_prefix(prefix: Path, stream: str) -> Path:
    """FORMAT: `<prefix>_<stream>_document`."""
    return prefix.with_name(f"{prefix.name}_{stream}_document")


class ResumableOutput:
    """A context: on a clean end and on a DataError the folder goes, else (killed, stopped, disk full) it stays to go on from.

    files: stream -> prefix of its .bin/.idx
    """

    def __init__(self, prefix: Path, formats: Mapping[str, StreamFormat], *, asked: dict[str, Any]) -> None:
        self.prefix = prefix
        self.folder = prefix.with_name(f"{prefix.name}.partial")
        self.files = {name: stream_prefix(prefix, name) for name in formats}
        self.streams = {name: StreamFiles(self.folder, name, stream) for name, stream in formats.items()}
        self.journal = Journal(xxhash.xxh3_128_hexdigest(json.dumps(asked, sort_keys=True, default=str).encode()))
        self._started = self._recorded = time.monotonic()
        self._lock = FileLock(self.folder / "lock")

    def __enter__(self) -> ResumableOutput:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise DataError(
                "another run is writing the same files", where=str(self.folder), fix="wait for it, or choose another output prefix"
            ) from error
        except OSError as error:
            raise DataError(f"cannot write: {error.strerror}", where=str(self.folder), fix="choose a writable output prefix") from error
        self._take_up()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for stream in self.streams.values():
            stream.close()
        # A DataError of the input or of a record would come again. One about the disk has an OSError as its cause, and a process that
        # died may have more memory the next time.
        if error is None or (isinstance(error, DataError) and error.__cause__ is None):
            shutil.rmtree(self.folder, ignore_errors=True)
        elif isinstance(error, KeyboardInterrupt):
            log.info("stopped: the same command goes on from %s; or remove it", self.folder)
        self._lock.release()

    def _take_up(self) -> None:
        try:
            saved = json.loads((self.folder / JOURNAL).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            saved = {}
        if saved.get("asked") == self.journal.asked:
            self.journal = Journal(**{**saved, "position": BlockStart(*saved["position"]), "counts": Counts(**saved["counts"])})
            self._started -= self.journal.counts.seconds
            log.info("going on with %s after %d documents", self.folder, self.journal.counts.documents)
            return
        if saved:
            log.info("%s holds an unfinished run with other input or settings: starting anew", self.folder)
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()

    def restore(self) -> None:
        """Open the streams where the record of progress says."""
        for name, stream in self.streams.items():
            stream.open(self.journal.streams.get(name))

    def advance(self, position: BlockStart) -> None:
        """All before `position` is written; this is recorded every RECORD_EVERY_S seconds."""
        self.journal.position = position
        if time.monotonic() - self._recorded > RECORD_EVERY_S:
            self.record()

    def record(self, *, done: bool = False) -> None:
        """Put on disk how far this is."""
        journal = self.journal
        journal.streams = {name: stream.state() for name, stream in self.streams.items()}
        journal.done = done
        journal.counts.seconds = time.monotonic() - self._started
        self._write_journal()
        self._recorded = time.monotonic()

    def seal(self, sources: list[dict[str, Any]], about: dict[str, Any], *, legacy: bool) -> None:
        """Build the final files in this folder, and list how they will be named."""
        data, indexes = [], []
        for name, stream in self.streams.items():
            values, index = stream.seal(legacy=legacy)
            data.append((str(values), str(data_file(self.files[name]))))
            indexes.append((str(index), str(index_file(self.files[name]))))
        self.journal.facts = {
            "tokens": {name: stream.num_values for name, stream in self.streams.items()},
            "documents": {name: stream.documents for name, stream in self.streams.items()},
        }
        aside, metadata = self.folder / "metadata", self.prefix.with_name(f"{self.prefix.name}_metadata.json")
        aside.write_text(json.dumps(self._metadata(sources, about), indent=1, default=str) + "\n", encoding="utf-8")
        self.journal.publishing = [*data, *indexes, (str(aside), str(metadata))]
        self._write_journal()

    def publish(self) -> None:
        """Give every file its name. An old index is never seen beside new data: it goes first, the new one comes last."""
        there = [(source, target) for source, target in self.journal.publishing if os.path.exists(source)]
        if any(target.endswith(".bin") for _, target in there):
            for _, target in self.journal.publishing:
                if target.endswith(".idx"):
                    Path(target).unlink(missing_ok=True)
        for source, target in there:
            os.replace(source, target)

    def _metadata(self, sources: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
        counts, facts = self.journal.counts, self.journal.facts
        tokens = facts["tokens"]
        labelled = [name for name in tokens if name == "label" or name.endswith("_label")]
        share = {}
        if counts.trained is not None and labelled:
            share = {"trained_tokens": counts.trained, "trained_share": counts.trained / max(sum(tokens[name] for name in labelled), 1)}
        first = next(iter(tokens))
        return {
            **about,
            "token_counts": tokens,
            "document_counts": facts["documents"],
            "total_tokens": tokens[first],
            "total_documents": facts["documents"][first],
            **share,
            "records": counts.records,
            "dropped": counts.dropped,
            "first_dropped": counts.first_dropped,
            "bad_records": counts.bad,
            "first_bad": counts.first_bad,
            **({"notes": counts.notes} if counts.notes else {}),
            "total_bytes_processed": counts.source_bytes,
            "processing_time_seconds": round(counts.seconds, 3),
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "sources": sources,
            "output_files": {name: {"bin": str(data_file(path)), "idx": str(index_file(path))} for name, path in self.files.items()},
        }

    def _write_journal(self) -> None:
        write_durably(self.folder / JOURNAL, json.dumps(asdict(self.journal)))


class StreamFiles:
    """`<folder>/<name>.values` and `<name>.sizes`, appended to and cut back to what a record of progress says."""

    def __init__(self, folder: Path, name: str, stream: StreamFormat) -> None:
        self.name = name
        self.stream = stream
        self.num_values = self.documents = 0
        self.whole = True
        self._values_path = folder / f"{name}.values"
        self._sizes_path = folder / f"{name}.sizes"
        self._files: list[IO[bytes]] = []

    def open(self, state: dict[str, Any] | None) -> None:
        """Start from nothing, or go on from `state`; what was written after it is cut off."""
        state = state or {"values": 0, "documents": 0, "whole": True}
        self.num_values, self.documents, self.whole = state["values"], state["documents"], state["whole"]
        for path, size in ((self._values_path, self.num_values * self.stream.dtype.itemsize), (self._sizes_path, self.documents * 4)):
            path.touch()
            if path.stat().st_size < size:
                raise DataError(
                    f"{path} is shorter than its record of progress says", where=str(path), fix=f"remove {path.parent} and start again"
                )
            os.truncate(path, size)
            self._files.append(path.open("ab"))

    def append(self, part: Ragged) -> None:
        """Add documents. Values are of the stream's dtype already."""
        if self.stream.integral is not None and self.whole:
            self.whole = bool((part.values == np.rint(part.values)).all())
        self._files[0].write(np.ascontiguousarray(part.values).data)
        self._files[1].write(np.ascontiguousarray(part.sizes, dtype="<i4").data)
        self.num_values += len(part.values)
        self.documents += len(part.sizes)

    def state(self) -> dict[str, Any]:
        """Flush to disk, and say how far it is."""
        for file in self._files:
            file.flush()
            os.fdatasync(file.fileno())
        return {"values": self.num_values, "documents": self.documents, "whole": self.whole}

    def close(self) -> None:
        """Close both files."""
        for file in self._files:
            with suppress(OSError):  # a full disk fails once more when buffers are flushed; it was reported by the write
                file.close()
        self._files = []

    def seal(self, *, legacy: bool = False) -> tuple[Path, Path]:
        """Make the index, and where all values are whole the narrower data. Returns the files that become `.bin` and `.idx`.

        legacy: the index in the old TNTIDX format
        """
        self.close()
        data, dtype = self._values_path, self.stream.dtype
        if self.stream.integral is not None and self.whole:
            data, dtype = data.with_suffix(".integral"), self.stream.integral
            self._convert(data, dtype)
        index = self._values_path.with_suffix(".index")
        sizes, firsts = map_values(self._sizes_path, np.dtype("<i4")), range(0, self.documents, STEP)
        with atomic_write(index, "wb") as file:
            if legacy:
                write_legacy_index(file, sizes, dtype)
            else:
                write_index(
                    file,
                    dtype.newbyteorder("<"),
                    (self.documents, self.documents),
                    lambda: (sizes[first : first + STEP] for first in firsts),
                    (np.arange(first + 1, min(first + STEP, self.documents) + 1) for first in firsts),
                )
        return data, index

    def _convert(self, path: Path, dtype: np.dtype[Any]) -> None:
        values = map_values(self._values_path, self.stream.dtype)
        with atomic_write(path, "wb") as file:
            for start in range(0, len(values), STEP):
                file.write(values[start : start + STEP].astype(dtype).data)
