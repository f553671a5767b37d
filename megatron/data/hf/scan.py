# SPDX-License-Identifier: Apache-2.0
"""Passes over all records that write no tokens: counting them, exporting them as JSON lines."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import orjson

from megatron.atomic_io import atomic_write
from megatron.data.hf.record_adapters import RecordAdapter
from megatron.data.preprocess.blocks import BlockStart, RecordSource
from megatron.data.preprocess.encoders import Dropped, EncoderSource, Fault
from megatron.data.preprocess.resumable_output import Counts
from megatron.data.preprocess.writer import EncodingProgress, Options, encoded, open_encoder, tally
from megatron.errors import DataError


def count(source: RecordSource, encoder_source: EncoderSource, options: Options) -> tuple[Counts, dict[str, int]]:
    """What `write` would write: counts, and tokens of each stream. Nothing is written."""
    encoder = open_encoder(encoder_source, options) if options.workers == 1 else None
    counts, tokens = Counts(), Counter[str]()
    with EncodingProgress(source.total_bytes, counts, options.log_interval, options.num_docs) as progress:
        for done in encoded(source, encoder, encoder_source, BlockStart(), options):
            tally(counts, done, options.skip_bad)
            for name, part in done.batch.streams.items():
                tokens[name] += len(part.values)
            progress.update(counts)
    if counts.documents == 0:
        raise DataError("no record gives a document", where="input", fix="check the columns: are their texts empty?")
    return counts, dict(tokens)


def export(source: RecordSource, shape: RecordAdapter, path: Path, *, skip_bad: int) -> dict[str, Any]:
    """Write every shaped record as a line of JSON; the file appears when it is whole.

    Raises DataError for bad records beyond `skip_bad`.
    """
    make = shape.open()
    lines = bad = empty = 0
    try:
        with atomic_write(path, "wb") as out:
            for block in source.blocks(BlockStart()):
                read = block.read()
                faults = list(read.faults)
                for number, record in zip(read.numbers, read.records, strict=True):
                    shaped = make(record)
                    if isinstance(shaped, Fault):
                        faults.append((number, shaped.what))
                    elif isinstance(shaped, Dropped) or shaped.get("text") == "":
                        empty += 1
                    else:
                        out.write(orjson.dumps(shaped, default=str, option=orjson.OPT_APPEND_NEWLINE))
                        lines += 1
                bad += len(faults)
                if bad > skip_bad:
                    number, what = min(faults)
                    raise DataError(what, where=block.label(number), fix="fix it, name other columns, or allow some with --skip-bad N")
    except OSError as error:
        raise DataError(f"cannot write: {error.strerror}", where=str(path), fix="free some space, or --no-jsonl") from error
    return {"lines": lines, "empty": empty, "bad": bad}
