# SPDX-License-Identifier: Apache-2.0
"""A source of records through an encoder into `.bin/.idx` streams: in order, in constant memory, all or nothing, resumable."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron.data.preprocess.blocks import BlockStart, RecordSource
from megatron.data.preprocess.encoders import Encoder, EncoderSource
from megatron.data.preprocess.encoding_pool import SHOWN, Done, EncodingPool, encode, usable_cores
from megatron.data.preprocess.resumable_output import Counts, ResumableOutput
from megatron.errors import DataError
from megatron.log import get_logger
from megatron.tokenizer import set_library_threads

log = get_logger(__name__)
LINE_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to write.

    workers:      processes that encode; 1 encodes in this one, with all cores
    skip_bad:     malformed records that may be left out; one more ends the run
    legacy:       write the index of the old cached/lazy format
    log_interval: documents between two lines of progress at least, where there is no terminal
    num_docs:     documents expected, for progress only
    about:        plain values for `<prefix>_metadata.json`
    """

    workers: int = 1
    skip_bad: int = 0
    legacy: bool = False
    log_interval: int = 1000
    num_docs: int | None = None
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WrittenDataset:
    """What was written. files: stream -> prefix of its .bin/.idx; counts: records by what became of them"""

    files: dict[str, Path]
    tokens: dict[str, int]
    documents: dict[str, int]
    counts: Counts
    seconds: float


class EncodingProgress:
    """A context; `update` costs next to nothing.

    total_bytes: of the input, None where not known; start: what an earlier run had done
    log_interval: documents between two lines at least; num_docs: documents expected
    """

    def __init__(self, total_bytes: int | None, start: Counts, log_interval: int, num_docs: int | None) -> None:
        self.total_bytes, self.num_docs, self.log_interval = total_bytes, num_docs, log_interval
        self._documents = self._said_documents = start.documents
        self._bytes = start.source_bytes
        self._started = self._said = time.monotonic()
        # disable=None: no bar where standard error is no terminal
        self._bar = tqdm(total=total_bytes, initial=self._bytes, unit="B", unit_scale=True, mininterval=0.5, disable=None)

    def __enter__(self) -> EncodingProgress:
        return self

    def __exit__(self, *ended: object) -> None:
        self._bar.close()

    def update(self, counts: Counts) -> None:
        """Show how far it is, if it is time."""
        now = time.monotonic()
        if not self._bar.disable:
            if now - self._said > 0.5:
                self._said = now
                self._bar.set_postfix_str(f"{counts.documents} docs, {self._rate(counts, now):.0f} docs/s", refresh=False)
                self._bar.update(counts.source_bytes - self._bar.n)
            return
        if now - self._said > LINE_EVERY_S and counts.documents - self._said_documents >= self.log_interval:
            self._said, self._said_documents = now, counts.documents
            log.info("%s", self.line(counts, now))

    def line(self, counts: Counts, now: float) -> str:
        """Documents, speed and what is left, in one line."""
        seconds = max(now - self._started, 1e-9)
        parts = [f"{counts.documents} documents", f"{self._rate(counts, now):.1f} docs/s"]
        speed = (counts.source_bytes - self._bytes) / seconds
        if speed > 0:
            parts.append(f"{speed / 1e6:.2f} MB/s")
        done, whole, rate = counts.source_bytes, self.total_bytes, speed
        if not whole or speed <= 0:
            done, whole, rate = counts.documents, self.num_docs, self._rate(counts, now)
        if whole and rate > 0:
            parts.append(f"{100 * done / whole:.1f} %, {max(whole - done, 0) / rate:.0f} s left")
        return ", ".join(parts)

    def _rate(self, counts: Counts, now: float) -> float:
        return (counts.documents - self._documents) / max(now - self._started, 1e-9)


def write(
    source: RecordSource, encoder_source: EncoderSource, prefix: Path, options: Options | None = None, *, encoder: Encoder | None = None
) -> WrittenDataset:
    """Encode every record and write its streams to `<prefix>_<stream>_document.bin/.idx`, and `<prefix>_metadata.json`.

    The bytes do not depend on `workers`. Everything is written in the folder `<prefix>.partial` and renamed at the end; a run that was
    killed goes on from there when it is started again in the same way. Raises DataError for bad records beyond `skip_bad` (nothing is
    left then), for a full disk (what is done is kept for the next try), and when no record gives a document.

    encoder: what `encoder_source` opens, if it is open in this process already
    """
    options = options or Options()
    if options.workers < 1:
        raise DataError(f"workers must be at least 1, got {options.workers}", where="workers", fix="give 1 or more")
    if encoder is None:
        encoder = open_encoder(encoder_source, options)
    inputs = source.facts()
    stored, digest = dict(encoder.streams), getattr(getattr(encoder, "tokenizer", None), "digest", "")
    # all that the bytes depend on
    asked = {"encoder": repr(encoder_source), "tokenizer": digest, "source": inputs, "legacy": options.legacy, "skip": options.skip_bad}
    if options.workers > 1:
        encoder = None  # the other processes have their own; this one does not hold its memory
    with ResumableOutput(prefix, stored, asked=asked) as output:
        try:
            if not output.journal.publishing:
                _fill(source, encoder, encoder_source, output, options)
                output.record(done=True)
                output.seal(inputs, options.about, legacy=options.legacy)
            output.publish()
        except OSError as error:
            raise _disk_error(error, output) from error
    facts, counts = output.journal.facts, output.journal.counts
    return WrittenDataset(output.files, facts["tokens"], facts["documents"], counts, counts.seconds)


def open_encoder(source: EncoderSource, options: Options) -> Encoder:
    """The encoder for this process; with one worker it uses all cores."""
    if options.workers == 1:
        set_library_threads(usable_cores())
    return source.open()


def _fill(source: RecordSource, encoder: Encoder | None, encoder_source: EncoderSource, output: ResumableOutput, options: Options) -> None:
    """Everything from where the unfinished run stopped to the end of the source."""
    output.restore()
    journal, counts = output.journal, output.journal.counts
    if journal.done:
        return
    with EncodingProgress(source.total_bytes, counts, options.log_interval, options.num_docs) as progress:
        for done in encoded(source, encoder, encoder_source, journal.position, options):
            tally(counts, done, options.skip_bad)
            for name, part in done.batch.streams.items():
                output.streams[name].append(part)
            progress.update(counts)
            if done.after is not None:
                output.advance(done.after)
    if not any(stream.documents for stream in output.streams.values()):
        raise DataError(
            "no record gave a document" + _shown(counts.first_dropped),
            where=str(output.prefix),
            fix="check the input: are its texts empty?",
        )


def encoded(
    source: RecordSource, encoder: Encoder | None, encoder_source: EncoderSource, start: BlockStart, options: Options
) -> Iterator[Done]:
    """The blocks from `start` on, encoded, in order.

    encoder: of this process; None = it is opened, by each of the other processes where there are several workers
    """
    blocks = source.blocks(start)
    if encoder is None and options.workers == 1:
        encoder = open_encoder(encoder_source, options)
    if encoder is not None:
        yield from (encode(block, encoder) for block in blocks)
        return
    with EncodingPool(encoder_source, options.workers) as pool:
        yield from pool.encoded(blocks)


def tally(counts: Counts, done: Done, allowed: int) -> None:
    """Add what became of a block's records. Raises DataError when more than `allowed` cannot be used."""
    counts.records += done.records
    counts.source_bytes += done.source_bytes
    counts.documents += done.batch.documents
    if done.batch.trained is not None:
        counts.trained = (counts.trained or 0) + done.batch.trained
    for reason, number in done.batch.dropped.items():
        counts.dropped[reason] = counts.dropped.get(reason, 0) + number
    for name, number in done.batch.notes.items():
        counts.notes[name] = counts.notes.get(name, 0) + number
    counts.first_dropped = [*counts.first_dropped, *done.droppings][:SHOWN]
    counts.bad += done.num_faults
    counts.first_bad = [*counts.first_bad, *done.faults][:SHOWN]
    if counts.bad > allowed:
        raise DataError(
            f"{counts.bad} of the first {counts.records} records cannot be used{_shown(counts.first_bad)}",
            where=counts.first_bad[0][0],
            fix="fix them, name the right columns, or leave bad records out with --skip-bad N (they are counted)",
        )


def _shown(places: list[tuple[str, str]]) -> str:
    return "".join(f"\n    {where}: {why}" for where, why in places)


def _disk_error(error: OSError, output: ResumableOutput) -> DataError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return DataError(
        "the disk is full" if full else f"cannot write: {error.strerror or error}",
        where=str(error.filename or output.folder),
        fix=f"{'free some space' if full else 'check disk and rights'} and run this again: it goes on where it stopped;"
        f" or give up and remove {output.folder}",
    )
