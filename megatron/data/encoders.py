# SPDX-License-Identifier: Apache-2.0
"""From records to the ids of each stream they feed. Knows tokenizers, no files and no processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron.data.indexed_dataset import best_dtype
from megatron.tokenizer import Tokenizer, TokenizerSource, open_tokenizer

Encoded = Mapping[str, NDArray[Any]]
"""Stream -> values [n] of one document."""


class Dropped(NamedTuple):
    """A record that rightly gives no document; counted by reason ("empty", "nothing to train", ...)."""

    reason: str


class Fault(NamedTuple):
    """A record that cannot be used (wrong columns, a template's error): shown with its file and line, and ends the run unless allowed."""

    what: str


Outcome = Encoded | Dropped | Fault
"""What became of one record."""


@dataclass(frozen=True)
class Stream:
    """How the values of a stream are stored.

    dtype:    of the file
    integral: dtype of equal width to store instead, where every value of the whole run is a whole number (rewards); None = never
    """

    dtype: np.dtype[Any]
    integral: np.dtype[Any] | None = None


class Ragged(NamedTuple):
    """Documents of one stream back to back: values [sum of sizes], sizes [documents] int32."""

    values: NDArray[Any]
    sizes: NDArray[np.int32]


@dataclass
class Batch:
    """Some records, encoded.

    streams:   the same number of documents in each
    trained:   tokens with a label; None where there are no labels
    dropped:   reason -> records
    faults:    (number of the record in the batch, what is wrong)
    droppings: (number of the record, reason) of every dropped record, in order
    notes:     kept records by what is worth telling of them
    """

    streams: dict[str, Ragged]
    trained: int | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[int, str]] = field(default_factory=list)
    droppings: list[tuple[int, str]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def documents(self) -> int:
        """Documents in each stream."""
        return len(next(iter(self.streams.values())).sizes)


def gather(outcomes: Sequence[Outcome], streams: Mapping[str, Stream], *, trained: int | None = None) -> Batch:
    """One batch of the outcomes of its records, in order.

    >>> streams = {"text": Stream(np.dtype("<u2"))}
    >>> batch = gather([{"text": np.array([5, 6])}, Dropped("empty"), {"text": np.array([7])}], streams)
    >>> batch.streams["text"].values.tolist(), batch.streams["text"].sizes.tolist(), dict(batch.dropped)
    ([5, 6, 7], [2, 1], {'empty': 1})
    """
    kept: list[Encoded] = []
    batch = Batch({}, trained)
    for number, outcome in enumerate(outcomes):
        if isinstance(outcome, Dropped):
            batch.dropped[outcome.reason] += 1
            batch.droppings.append((number, outcome.reason))
        elif isinstance(outcome, Fault):
            batch.faults.append((number, outcome.what))
        else:
            kept.append(outcome)
    batch.streams = {name: ragged([encoded[name] for encoded in kept], stream.dtype) for name, stream in streams.items()}
    return batch


def ragged(parts: Sequence[NDArray[Any]], dtype: DTypeLike) -> Ragged:
    """Parts of any length back to back, as `dtype`."""
    sizes = np.fromiter((len(part) for part in parts), dtype=np.int32, count=len(parts))
    return Ragged(np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype, copy=False), sizes)


class Encoder(Protocol):
    """Records -> documents. `streams` names every stream and how it is stored."""

    @property
    def streams(self) -> Mapping[str, Stream]: ...

    def __call__(self, records: Sequence[Any]) -> Batch:
        """Encode the records; what cannot be encoded is in the batch's faults, never an exception."""
        ...


class EncoderSource(Protocol):
    """How to open an encoder in another process: small, picklable, hashable; its `repr` says all that the bytes depend on."""

    def __hash__(self) -> int: ...
    def open(self) -> Encoder: ...


@dataclass(frozen=True)
class TextSource:
    """Plain text into one stream; `append_eod` ends every document with the tokenizer's eod."""

    tokenizer: TokenizerSource
    append_eod: bool = True
    stream: str = "text"

    def open(self) -> TextEncoder:
        """Open the tokenizer."""
        return TextEncoder(open_tokenizer(self.tokenizer), append_eod=self.append_eod, stream=self.stream)


class TextEncoder:
    """Texts -> ids of one stream. A text without any token is no document."""

    def __init__(self, tokenizer: Tokenizer, *, append_eod: bool, stream: str = "text") -> None:
        self.tokenizer = tokenizer
        self.stream = stream
        self.tail = [tokenizer.eod] if append_eod else []
        self.streams = {stream: Stream(best_dtype(tokenizer.vocab_size))}

    def __call__(self, records: Sequence[str]) -> Batch:
        """Ids of each text, eod included."""
        encoded = self.tokenizer.encode_batch(records)
        return gather([{self.stream: np.array(ids + self.tail)} if ids else Dropped("empty") for ids in encoded], self.streams)
