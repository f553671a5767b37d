# SPDX-License-Identifier: Apache-2.0
"""What a `.bin/.idx` pair holds, in numbers, and whether labels fit their tokens. Reads in blocks; prints nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed_dataset import IndexedDataset, exists
from megatron.data.legacy_dataset import LegacyDataset
from megatron.data.preprocess.encoders import UNTRAINED

BLOCK_VALUES = 4 * 2**20
BLOCK_DOCUMENTS = 2**16
QUANTILES = {"median": 50, "p90": 90, "p95": 95, "p99": 99}

Pair = IndexedDataset | LegacyDataset


@dataclass(frozen=True, kw_only=True)
class DatasetStatistics:
    """One pair in numbers.

    documents:    sequences of the file; training takes each for a document
    marked:       documents by the file's own marks, where they tell another number
    lengths:      "min", "mean", "median", "p90", "p95", "p99", "max"; of an empty file nothing
    outside:      values that are no id of the vocabulary (None: vocabulary not known)
    eod_values:   end-of-document ids in all; eod_ends: documents that end in one (None: id not known)
    trained:      values with a label; untrained: documents without any (None: no labels)
    """

    documents: int
    marked: int | None
    values: int
    dtype: str
    empty: int
    lengths: dict[str, float]
    smallest: float | None
    largest: float | None
    outside: int | None = None
    eod_values: int | None = None
    eod_ends: int | None = None
    trained: int | None = None
    untrained: int | None = None


class LabelMismatch(NamedTuple):
    """A place where labels do not fit their tokens."""

    document: int
    position: int
    token: int
    label: int


@dataclass
class Agreement:
    """How labels fit their tokens: `problems` about the files as a whole, and the first differing places."""

    problems: list[str] = field(default_factory=list)
    first: list[LabelMismatch] = field(default_factory=list)
    differing: int = 0

    @property
    def ok(self) -> bool:
        """Whether there is nothing to tell."""
        return not self.problems and not self.differing


def labels_beside(prefix: str | Path) -> str | None:
    """The prefix of the labels that belong to tokens at `prefix`, told by the tools' names; None where there are none."""
    name = str(prefix)
    if not name.endswith("_document") or name.endswith(("_label_document", "_reward_document", "_lengths_document")):
        return None
    stem = name.removesuffix("_document")
    candidates = [f"{stem}_label_document"]
    if stem.endswith("_text"):
        candidates.append(f"{stem.removesuffix('_text')}_label_document")  # as preprocess_data_with_mask.py names them
    return next((candidate for candidate in candidates if exists(candidate)), None)


def quantiles(lengths: NDArray[np.integer]) -> dict[str, float]:
    """Smallest, mean, median, p90, p95, p99, largest of [n]; {} for n = 0.

    >>> quantiles(np.array([1, 2, 3]))["median"], quantiles(np.array([], int))
    (2.0, {})
    """
    if not len(lengths):
        return {}
    inner = np.percentile(lengths, list(QUANTILES.values()))
    return {
        "min": float(lengths.min()),
        "mean": float(lengths.mean(dtype=np.float64)),
        **{name: float(value) for name, value in zip(QUANTILES, inner, strict=True)},
        "max": float(lengths.max()),
    }


def statistics(tokens: Pair, labels: Pair | None = None, *, vocab_size: int | None = None, eod: int | None = None) -> DatasetStatistics:
    """Count through all values once. Labels of other lengths than the tokens count nothing: see `compare`.

    A pair that is itself one of labels (it holds negative values) needs none: its trained values are those >= 0.
    """
    smallest, largest = None, None
    outside = eod_values = eod_ends = trained = untrained = 0
    fits = labels is not None and np.array_equal(labels.sizes, tokens.sizes)
    masks = labels.values if labels is not None and fits else tokens.values
    for ends, start, stop in blocks(tokens.sizes):
        values = tokens.values[start:stop]
        if len(values):
            smallest = min(values.min(), values.min() if smallest is None else smallest)
            largest = max(values.max(), values.max() if largest is None else largest)
        if vocab_size is not None:
            outside += int(((values >= vocab_size) | ((values < 0) & (values != UNTRAINED))).sum())
        if eod is not None:
            is_eod = np.concatenate([[False], values == eod])
            eod_values += int(is_eod.sum())
            eod_ends += int((is_eod[ends[1:]] & (np.diff(ends) > 0)).sum())
        before = np.concatenate([[0], np.cumsum(masks[start:stop] >= 0)])
        per_document = np.diff(before[ends])
        trained += int(per_document.sum())
        untrained += int((per_document == 0).sum())
    knows = tokens.dtype.kind != "f" and (fits or (smallest is not None and smallest < 0))
    return DatasetStatistics(
        documents=len(tokens),
        marked=len(tokens.doc_idx) - 1 if len(tokens.doc_idx) - 1 != len(tokens) else None,
        values=tokens.num_tokens,
        dtype=str(tokens.dtype),
        empty=int((tokens.sizes == 0).sum()),
        lengths=quantiles(tokens.sizes),
        smallest=None if smallest is None else smallest.item(),
        largest=None if largest is None else largest.item(),
        outside=outside if vocab_size is not None else None,
        eod_values=eod_values if eod is not None else None,
        eod_ends=eod_ends if eod is not None else None,
        trained=trained if knows else None,
        untrained=untrained if knows else None,
    )


def compare(tokens: Pair, labels: Pair, *, show: int = 10) -> Agreement:
    """Whether the labels belong to the tokens: as many documents, of the same lengths, and every label its token or -100.

    show: how many differences are kept
    """
    found = Agreement()
    if len(tokens) != len(labels):
        found.problems.append(f"{len(tokens)} documents of tokens, {len(labels)} of labels")
    both = min(len(tokens), len(labels))
    odd = np.flatnonzero(tokens.sizes[:both] != labels.sizes[:both])
    for document in odd[:show]:
        found.problems.append(f"document {document}: {tokens.sizes[document]} tokens, {labels.sizes[document]} labels")
    if len(odd) > show:
        found.problems.append(f"... and {len(odd) - show} more documents of unequal lengths")
    # Behind the first document of another length every place is another one.
    same = int(odd[0]) if len(odd) else both
    done = 0
    for ends, start, stop in blocks(tokens.sizes[:same]):
        theirs, mine = tokens.values[start:stop], labels.values[start:stop]
        wrong = np.flatnonzero((mine != theirs) & (mine != UNTRAINED))
        found.differing += len(wrong)
        for place in wrong[: show - len(found.first)]:
            document = int(np.searchsorted(ends, place, side="right")) - 1
            found.first.append(LabelMismatch(done + document, int(place - ends[document]), int(theirs[place]), int(mine[place])))
        done += len(ends) - 1
    return found


def first_trained(labels: NDArray[np.number], sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    """[d] place of the first trained token of each document; its length where none is trained.

    >>> first_trained(np.array([-100, 5, -100, 7]), np.array([3, 0, 1]))
    array([1, 0, 0])
    """
    found = []
    for ends, start, stop in blocks(sizes):
        places = np.append(np.flatnonzero(labels[start:stop] >= 0), np.iinfo(np.int64).max)
        found.append(np.minimum(places[np.searchsorted(places, ends[:-1])], ends[1:]) - ends[:-1])
    return np.concatenate([np.zeros(0, np.int64), *found])


def blocks(sizes: NDArray[np.int32]) -> Iterator[tuple[NDArray[np.int64], int, int]]:
    """Blocks of whole documents: (borders within the block [documents + 1], first value, behind the last)."""
    start, first = 0, 0
    while first < len(sizes):
        ends = np.cumsum(sizes[first : first + BLOCK_DOCUMENTS], dtype=np.int64)
        count = max(1, int(np.searchsorted(ends, BLOCK_VALUES, side="right")))
        borders = np.concatenate([np.zeros(1, np.int64), ends[:count]])
        stop = start + int(borders[-1])
        yield borders, start, stop
        start, first = stop, first + count
