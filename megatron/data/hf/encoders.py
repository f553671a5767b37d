# SPDX-License-Identifier: Apache-2.0
"""Encoders around encoders: records shaped first, documents without anything trained within a length left out. Knows no tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.hf.record_adapters import RecordAdapter
from megatron.data.preprocess.encoders import UNTRAINED, Dropped, EncodedRecords, Encoder, EncoderSource, Fault, Ragged, StreamFormat

LENGTHS = "lengths"


@dataclass(frozen=True)
class ShapedSource:
    """Records through `shape`, then through `inner`."""

    shape: RecordAdapter
    inner: EncoderSource

    def open(self) -> ShapedEncoder:
        """Open both."""
        return ShapedEncoder(self.shape, self.inner.open())


class ShapedEncoder:
    """See ShapedSource."""

    def __init__(self, shape: RecordAdapter, inner: Encoder) -> None:
        self.shape = shape.open()
        self.inner = inner
        self.tokenizer = getattr(inner, "tokenizer", None)
        self.streams: Mapping[str, StreamFormat] = inner.streams

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> EncodedRecords:
        """The inner encoder's batch of the records that could be shaped; numbers are those of `records`."""
        numbers, good = [], []
        dropped, faults = [], []
        for number, record in enumerate(records):
            shaped = self.shape(record)
            if isinstance(shaped, Dropped):
                dropped.append((number, shaped.reason))
            elif isinstance(shaped, Fault):
                faults.append((number, shaped.what))
            else:
                numbers.append(number)
                good.append(shaped)
        batch = self.inner(good)
        batch.faults = sorted([*faults, *((numbers[number], what) for number, what in batch.faults)])
        batch.droppings = sorted([*dropped, *((numbers[number], reason) for number, reason in batch.droppings)])
        batch.dropped.update(reason for _, reason in dropped)
        return batch


@dataclass(frozen=True)
class LimitedSource:
    """Documents of `inner`; those longer than `max_length` tokens are counted, and left out if none of what remains is trained."""

    inner: EncoderSource
    max_length: int

    def open(self) -> LimitedEncoder:
        """Open the inner encoder."""
        return LimitedEncoder(self.inner.open(), self.max_length)


class LimitedEncoder:
    """See LimitedSource. Nothing is cut: training does that."""

    def __init__(self, inner: Encoder, max_length: int) -> None:
        self.inner = inner
        self.max_length = max_length
        self.tokenizer = getattr(inner, "tokenizer", None)
        self.streams: Mapping[str, StreamFormat] = inner.streams
        self.labels = [name for name in inner.streams if name.endswith("_label")]
        self.mains = [name.removesuffix("_label") for name in self.labels] or list(inner.streams)
        self.long = f"documents longer than {max_length} tokens"
        self.lost = f"nothing to train within {max_length} tokens"

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> EncodedRecords:
        """The inner batch without the documents that lose all they train."""
        batch = self.inner(records)
        longest = np.max([batch.streams[name].sizes for name in self.mains], axis=0)
        long = longest > self.max_length
        if not long.any():
            return batch
        keep = np.ones(len(longest), bool)
        for name in self.labels:
            keep &= ~long | _trains(batch.streams[name], self.max_length)
        batch.notes[self.long] += int(long[keep].sum())
        if not keep.all():
            self._drop(batch, keep, len(records))
        return batch

    def _drop(self, batch: EncodedRecords, keep: NDArray[np.bool_], records: int) -> None:
        gone = {number for number, _ in (*batch.faults, *batch.droppings)}
        kept = [number for number in range(records) if number not in gone]
        lost = [number for number, stays in zip(kept, keep.tolist(), strict=True) if not stays]
        batch.droppings = sorted([*batch.droppings, *((number, self.lost) for number in lost)])
        batch.dropped[self.lost] += len(lost)
        batch.streams = {name: _kept(stream, keep) for name, stream in batch.streams.items()}
        if self.labels:
            batch.trained = sum(int((batch.streams[name].values != UNTRAINED).sum()) for name in self.labels)


def _trains(labels: Ragged, length: int) -> NDArray[np.bool_]:
    """Whether each document trains one of its first `length` tokens.

    >>> _trains(Ragged(np.array([-100, 5, -100, -100, 7]), np.array([2, 3])), 2).tolist()
    [True, False]
    """
    ends = np.cumsum(labels.sizes, dtype=np.int64)
    trained = np.concatenate([[0], np.cumsum(labels.values != UNTRAINED, dtype=np.int64)])
    starts = ends - labels.sizes
    within: NDArray[np.bool_] = trained[starts + np.minimum(labels.sizes, length)] > trained[starts]
    return within


def _kept(stream: Ragged, keep: NDArray[np.bool_]) -> Ragged:
    return Ragged(stream.values[np.repeat(keep, stream.sizes)], stream.sizes[keep])
