# SPDX-License-Identifier: Apache-2.0
"""From records to the ids of each stream they feed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron.data.indexed_dataset import best_dtype
from megatron.data.preprocess.blocks import keys_of
from megatron.tokenizer import Tokenizer, TokenizerSource, open_tokenizer
from megatron.tokenizer.tokenizer import encodable

UNTRAINED = -100  # FORMAT: the label of a token that is not trained
# The stream of preference pairs: 3 values per pair, the tokens of the prompt, of the chosen and of the rejected answer.
LENGTHS = "lengths"

Encoded = Mapping[str, NDArray[Any]]  # stream -> values [n] of one document


class Dropped(NamedTuple):
    """A record that gives no document, and is not malformed; counted by reason ("empty", "nothing to train", ...)."""

    reason: str


class Fault(NamedTuple):
    """A record that cannot be used (wrong columns, a template's error): shown with its file and line, and ends the run unless allowed."""

    what: str


Outcome = Encoded | Dropped | Fault  # what became of one record


@dataclass(frozen=True)
class StreamFormat:
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
class EncodedRecords:
    """Some records, encoded.

    streams:   the same number of documents in each
    trained:   tokens with a label; None where there are no labels
    dropped:   reason -> records
    faults:    (number of the record in the batch, what is wrong)
    droppings: (number of the record, reason) of every dropped record, in order
    notes:     further things worth counting, by name
    """

    streams: dict[str, Ragged]
    trained: int | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[int, str]] = field(default_factory=list)
    droppings: list[tuple[int, str]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def documents(self) -> int:
        """Documents of the first stream."""
        return len(next(iter(self.streams.values())).sizes)


def gather(outcomes: Sequence[Outcome], streams: Mapping[str, StreamFormat], *, trained: int | None = None) -> EncodedRecords:
    """One batch of the outcomes of its records, in order.

    >>> streams = {"text": StreamFormat(np.dtype("<u2"))}
    >>> batch = gather([{"text": np.array([5, 6])}, Dropped("empty"), {"text": np.array([7])}], streams)
    >>> batch.streams["text"].values.tolist(), batch.streams["text"].sizes.tolist(), dict(batch.dropped)
    ([5, 6, 7], [2, 1], {'empty': 1})
    """
    kept: list[Encoded] = []
    batch = EncodedRecords({}, trained)
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
    def streams(self) -> Mapping[str, StreamFormat]: ...

    def __call__(self, records: Sequence[Any]) -> EncodedRecords:
        """Encode the records; what cannot be encoded is in the batch's faults, never an exception."""


class EncoderSource(Protocol):
    """How to open an encoder in another process: small, picklable, hashable; its `repr` says all that the bytes depend on."""

    def __hash__(self) -> int: ...
    def open(self) -> Encoder: ...


@dataclass(frozen=True)
class TextSource:
    """Plain text, one stream per key.

    append_eod: every document ends with the tokenizer's eod
    keys:       of the records; each key's stream is what a run with that key alone would write
    ftfy:       fix mis-decoded text first
    wide:       store int32 even where uint16 would do
    """

    tokenizer: TokenizerSource
    append_eod: bool = True
    keys: tuple[str, ...] = ("text",)
    ftfy: bool = False
    wide: bool = False

    def open(self, tokenizer: Tokenizer | None = None) -> TextEncoder:
        """Open the tokenizer, unless it is open already."""
        return TextEncoder(tokenizer or open_tokenizer(self.tokenizer), self)


class TextEncoder:
    """Texts -> ids. A text without any token is no document."""

    def __init__(self, tokenizer: Tokenizer, source: TextSource) -> None:
        self.tokenizer = tokenizer
        self.keys = source.keys
        self.eod = tokenizer.eod if source.append_eod else None
        self.fix = text_fixer() if source.ftfy else str
        dtype = best_dtype(None if source.wide else tokenizer.vocab_size)
        self.streams = {key: StreamFormat(dtype) for key in self.keys}

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> EncodedRecords:
        """Ids of each text, eod included."""
        batch = EncodedRecords({})
        good = []
        for number, record in enumerate(records):
            missing = next((key for key in self.keys if not isinstance(record.get(key), str)), None)
            if missing is not None:
                batch.faults.append((number, f"no text under {missing!r} (found: {keys_of(record)})"))
            # JSON is never at fault: its reader refuses such texts.
            elif not all(encodable(record[key]) for key in self.keys):
                batch.faults.append((number, "the text holds half of a surrogate pair, which is no character"))
            else:
                good.append(number)
        for key in self.keys:
            values, sizes = self.tokenizer.encode_ragged([self.fix(records[number][key]) for number in good])
            empty = "empty" if len(self.keys) == 1 else f"empty {key}"
            for place in np.flatnonzero(sizes == 0).tolist():
                batch.dropped[empty] += 1
                batch.droppings.append((good[place], empty))
            batch.streams[key] = ended(values, sizes, self.eod, self.streams[key].dtype)
        batch.droppings.sort()
        return batch


def ended(values: NDArray[Any], sizes: NDArray[Any], eod: int | None, dtype: np.dtype[Any]) -> Ragged:
    """Documents with `eod` after each; those without any value are left out.

    >>> ended(np.array([5, 6, 7]), np.array([2, 0, 1]), 9, np.dtype("<i4"))
    Ragged(values=array([5, 6, 9, 7, 9], dtype=int32), sizes=array([3, 2], dtype=int32))
    """
    sizes = sizes[sizes > 0].astype(np.int32)
    if eod is None:
        return Ragged(values.astype(dtype, copy=False), sizes)
    return Ragged(np.insert(values.astype(dtype, copy=False), np.cumsum(sizes, dtype=np.int64), eod), sizes + np.int32(1))


@dataclass(frozen=True)
class MaskSource:
    """Plain text with labels: everything up to and including the first occurrence of `pattern` is not trained.

    pattern: token ids; empty, or not found in a text: all of it is trained
    """

    tokenizer: TokenizerSource
    append_eod: bool = False
    pattern: tuple[int, ...] = ()
    key: str = "text"
    ftfy: bool = False

    def open(self, tokenizer: Tokenizer | None = None) -> MaskEncoder:
        """Open the tokenizer, unless it is open already."""
        return MaskEncoder(TextSource(self.tokenizer, self.append_eod, (self.key,), self.ftfy, wide=True).open(tokenizer), self.pattern)


class MaskEncoder:
    """Texts -> the streams "text" and "label"."""

    def __init__(self, texts: TextEncoder, pattern: Sequence[int]) -> None:
        self.texts = texts
        self.tokenizer = texts.tokenizer
        self.pattern = np.array(pattern, dtype="<i4")
        # FORMAT: labels hold -100, and tokens are stored as they are.
        self.streams = {"text": StreamFormat(np.dtype("<i4")), "label": StreamFormat(np.dtype("<i4"))}

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> EncodedRecords:
        """Ids and labels [n] of each text."""
        batch = self.texts(records)
        values, sizes = batch.streams.popitem()[1]
        labels = values.copy()
        found = 0
        start = 0
        for size in sizes.tolist():
            if len(self.pattern) and (end := _end_of(self.pattern, values[start : start + size])) is not None:
                labels[start : start + end] = UNTRAINED
                found += 1
            start += size
        batch.streams = {"text": Ragged(values, sizes), "label": Ragged(labels, sizes)}
        batch.trained = int((labels != UNTRAINED).sum())
        if len(self.pattern) and found < len(sizes):
            batch.notes["texts without the pattern, trained whole"] += len(sizes) - found
        return batch


def _end_of(pattern: NDArray[Any], values: NDArray[Any]) -> int | None:
    """Where the first occurrence of the pattern ends."""
    if len(values) < len(pattern):
        return None
    places = np.flatnonzero((np.lib.stride_tricks.sliding_window_view(values, len(pattern)) == pattern).all(axis=1))
    return int(places[0]) + len(pattern) if len(places) else None


def text_fixer() -> Callable[[str], str]:
    """Fixes mis-decoded text."""
    import ftfy

    fix: Callable[[str], str] = ftfy.fix_text
    return fix
