# SPDX-License-Identifier: Apache-2.0
"""The folder of a dataset that is being written: its record of progress, how it is taken up again, and how its files get their names.

    <prefix>.partial/journal.json   what was asked, how far it is, or what is being renamed
    <prefix>.partial/<stream>.*     values and sizes

The renaming is listed in the journal before it begins, so that a run killed in the midst of it is finished by the next.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import xxhash

from megatron.atomic_io import write_durably
from megatron.data.indexed_dataset import data_file, index_file
from megatron.data.preprocess.blocks import BlockStart
from megatron.data.preprocess.stream_files import StreamFiles
from megatron.errors import DataError
from megatron.log import get_logger

log = get_logger(__name__)

JOURNAL = "journal.json"
RECORD_EVERY_S = 2.0


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


class ResumableOutput:
    """A context: on a clean end and on a DataError the folder goes, else (killed, stopped, disk full) it stays to go on from."""

    def __init__(self, prefix: Path, files: dict[str, Path], *, asked: dict[str, Any]) -> None:
        self.prefix = prefix
        self.files = files
        self.folder = prefix.with_name(f"{prefix.name}.partial")
        self.metadata = prefix.with_name(f"{prefix.name}_metadata.json")
        self.asked = xxhash.xxh3_128_hexdigest(json.dumps(asked, sort_keys=True, default=str).encode())
        self.counts = Counts()
        self.position = BlockStart()
        self.done = False
        self.publishing: list[tuple[str, str]] = []
        self.facts: dict[str, Any] = {}
        self._saved: dict[str, Any] = {}
        self._started = self._recorded = time.monotonic()
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> ResumableOutput:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("ab")
        except OSError as error:
            raise DataError(f"cannot write: {error.strerror}", where=str(self.folder), fix="choose a writable output prefix") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise DataError(
                "another run is writing the same files", where=str(self.folder), fix="wait for it, or choose another output prefix"
            ) from error
        self._take_up()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # A DataError of the input or of a record would come again. One about the disk has an OSError as its cause, and a process that
        # died may have more memory the next time.
        keep = kind is not None and not (issubclass(kind, DataError) and error is not None and error.__cause__ is None)
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif kind is not None and issubclass(kind, KeyboardInterrupt):
            log.info("stopped: the same command goes on from %s; or remove it", self.folder)
        if self._lock is not None:
            self._lock.close()

    def _take_up(self) -> None:
        try:
            saved = json.loads((self.folder / JOURNAL).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            saved = {}
        if saved.get("asked") != self.asked:
            if saved:
                log.info("%s holds an unfinished run with other input or settings: starting anew", self.folder)
            self._clear()
            return
        self.counts = Counts(**saved["counts"])
        self.position = BlockStart(*saved["position"])
        self.done = saved["done"]
        self.publishing = [(source, target) for source, target in saved["publishing"]]
        self.facts = saved["facts"]
        self._saved = saved["streams"]
        self._started -= self.counts.seconds
        log.info("going on with %s after %d documents", self.folder, self.counts.documents)

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()

    def restore(self, streams: dict[str, StreamFiles]) -> None:
        """Open the streams where the record of progress says."""
        for name, stream in streams.items():
            stream.open(self._saved.get(name))

    def record_sometimes(self, streams: dict[str, StreamFiles]) -> None:
        """`record` every RECORD_EVERY_S seconds."""
        if time.monotonic() - self._recorded > RECORD_EVERY_S:
            self.record(streams, self.position)

    def record(self, streams: dict[str, StreamFiles], position: BlockStart, *, done: bool = False) -> None:
        """Put on disk how far this is."""
        self._saved = {name: stream.state() for name, stream in streams.items()}
        self.position, self.done = position, done
        self.counts.seconds = time.monotonic() - self._started
        self._write_journal()
        self._recorded = time.monotonic()

    def seal(self, streams: dict[str, StreamFiles], sources: list[dict[str, Any]], about: dict[str, Any], *, legacy: bool) -> None:
        """Build the final files in this folder, and list how they will be named."""
        data, indexes = [], []
        for name, stream in streams.items():
            bin_aside, idx_aside = stream.seal(legacy=legacy)
            data.append((str(bin_aside), str(data_file(self.files[name]))))
            indexes.append((str(idx_aside), str(index_file(self.files[name]))))
        self.facts = {
            "tokens": {name: stream.num_values for name, stream in streams.items()},
            "documents": {name: stream.documents for name, stream in streams.items()},
        }
        aside = self.folder / "metadata"
        aside.write_text(json.dumps(self._metadata(sources, about), indent=1, default=str) + "\n", encoding="utf-8")
        self.publishing = [*data, *indexes, (str(aside), str(self.metadata))]
        self._write_journal()

    def publish(self) -> None:
        """Give every file its name. An old index is never seen beside new data: it goes first, the new one comes last."""
        if any(os.path.exists(source) for source, target in self.publishing if target.endswith(".bin")):
            for _, target in self.publishing:
                if target.endswith(".idx"):
                    Path(target).unlink(missing_ok=True)
        for source, target in self.publishing:
            if os.path.exists(source):
                os.replace(source, target)

    def _metadata(self, sources: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
        counts, tokens = self.counts, self.facts["tokens"]
        labelled = [name for name in tokens if name == "label" or name.endswith("_label")]
        share = {}
        if counts.trained is not None and labelled:
            share = {"trained_tokens": counts.trained, "trained_share": counts.trained / max(sum(tokens[name] for name in labelled), 1)}
        first = next(iter(tokens))
        return {
            **about,
            "token_counts": tokens,
            "document_counts": self.facts["documents"],
            "total_tokens": tokens[first],
            "total_documents": self.facts["documents"][first],
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
        content = {
            "asked": self.asked,
            "position": self.position,
            "done": self.done,
            "streams": self._saved,
            "counts": asdict(self.counts),
            "publishing": self.publishing,
            "facts": self.facts,
        }
        write_durably(self.folder / JOURNAL, json.dumps(content))
