# SPDX-License-Identifier: Apache-2.0
"""The records of a source one after the other, for whatever is not written to a dataset: a tokenizer's training, a first look."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from megatron.data.preprocess.blocks import BlockStart, keys_of
from megatron.data.preprocess.sources import RecordSource
from megatron.errors import DataError

FIRST_RECORDS = 64
FIRST_CHARACTERS = 1 << 17


def records(source: RecordSource) -> Iterator[dict[str, Any]]:
    """Every record. Raises DataError naming file and line of one that cannot be read."""
    for _, record in _labelled(source):
        yield record


def texts(source: RecordSource, key: str = "text") -> Iterator[str]:
    """The text under `key` of every record. Raises DataError naming file and line of one without."""
    for where, record in _labelled(source):
        if not isinstance(record.get(key), str):
            raise DataError(f"no text under {key!r} (found: {keys_of(record)})", where=where, fix="name the key that holds the text")
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


def _labelled(source: RecordSource) -> Iterator[tuple[str, dict[str, Any]]]:
    for block in source.blocks(BlockStart()):
        read = block.read()
        if read.faults:
            number, what = read.faults[0]
            raise DataError(what, where=block.label(number), fix="fix or remove it")
        for number, record in zip(read.numbers, read.records, strict=True):
            yield block.label(number), record
