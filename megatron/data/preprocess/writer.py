# SPDX-License-Identifier: Apache-2.0
"""A source of records through an encoder into `.bin/.idx` streams: in order, in constant memory, all or nothing, resumable.
Knows no text and no tokenizer."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.data.preprocess.blocks import BlockStart
from megatron.data.preprocess.encoders import Encoder, EncoderSource
from megatron.data.preprocess.encoding_pool import SHOWN, Done, EncodingPool, encode, usable_cores
from megatron.data.preprocess.progress import EncodingProgress
from megatron.data.preprocess.resumable_output import Counts, ResumableOutput
from megatron.data.preprocess.sources import RecordSource
from megatron.data.preprocess.stream_files import StreamFiles
from megatron.errors import DataError
from megatron.log import get_logger
from megatron.tokenizer import set_library_threads

log = get_logger(__name__)


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


def stream_prefix(prefix: Path, stream: str) -> Path:
    """FORMAT: `<prefix>_<stream>_document`."""
    return prefix.with_name(f"{prefix.name}_{stream}_document")


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
        raise DataError(f"{options.workers} workers cannot work", where="workers", fix="give 1 or more")
    if encoder is None:
        encoder = open_encoder(encoder_source, options)
    inputs = source.facts()
    stored, asked = dict(encoder.streams), _asked(inputs, encoder_source, encoder, options)
    if options.workers > 1:
        encoder = None  # the other processes have their own; this one does not hold its memory
    files = {stream: stream_prefix(prefix, stream) for stream in stored}
    with ResumableOutput(prefix, files, asked=asked) as output:
        streams = {name: StreamFiles(output.folder, name, stream) for name, stream in stored.items()}
        try:
            if not output.publishing:
                _fill(source, encoder, encoder_source, _Sinks(output, streams), options)
                output.record(streams, output.position, done=True)
                output.seal(streams, inputs, options.about, legacy=options.legacy)
            output.publish()
        except OSError as error:
            raise _disk_error(error, output) from error
        finally:
            for stream in streams.values():
                stream.close()
        facts = output.facts
    return WrittenDataset(files, facts["tokens"], facts["documents"], output.counts, output.counts.seconds)


def open_encoder(source: EncoderSource, options: Options) -> Encoder:
    """The encoder for this process; with one worker it uses all cores."""
    if options.workers == 1:
        set_library_threads(usable_cores())
    return source.open()


def _asked(inputs: list[dict[str, Any]], encoder_source: EncoderSource, encoder: Encoder, options: Options) -> dict[str, Any]:
    """All that the bytes depend on."""
    digest = getattr(getattr(encoder, "tokenizer", None), "digest", "")
    return {
        "encoder": repr(encoder_source),
        "tokenizer": digest,
        "source": inputs,
        "legacy": options.legacy,
        "skip": options.skip_bad,
    }


@dataclass
class _Sinks:
    output: ResumableOutput
    streams: dict[str, StreamFiles]


def _fill(source: RecordSource, encoder: Encoder | None, encoder_source: EncoderSource, sinks: _Sinks, options: Options) -> None:
    """Everything from where the unfinished run stopped to the end of the source."""
    output, streams = sinks.output, sinks.streams
    output.restore(streams)
    if output.done:
        return
    counts = output.counts
    with ExitStack() as stack:
        progress = stack.enter_context(EncodingProgress(source.total_bytes, counts, options.log_interval, options.num_docs))
        for done in encoded(source, encoder, encoder_source, output.position, options):
            tally(counts, done, options.skip_bad)
            for name, part in done.batch.streams.items():
                streams[name].append(part)
            progress.update(counts)
            if done.after is not None:
                output.position = done.after
                output.record_sometimes(streams)
    if not any(stream.documents for stream in streams.values()):
        raise DataError(
            "no record gave a document" + _shown(counts.first_dropped),
            where=str(output.prefix),
            fix="check the input: are its texts empty?",
        )


def encoded(
    source: RecordSource, encoder: Encoder | None, encoder_source: EncoderSource, start: BlockStart, options: Options
) -> Iterator[Done]:
    """The blocks from `start` on, encoded, in order. encoder: None = each of the other processes opens its own"""
    blocks = source.blocks(start)
    if encoder is not None:
        for block in blocks:
            yield encode(block, encoder)
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
