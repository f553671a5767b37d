# SPDX-License-Identifier: Apache-2.0
"""Which tokens make up sample i: pure functions of document lengths and a seed, in numpy.

Three ways of packing, all with rows of s + 1 tokens (input and shifted target):

packed               documents, shuffled, are one long tape cut every s tokens; neighbours share one token
pack_until_overflow  whole documents are put in a row while they fit; a row never starts inside a document
unpacked             one document is one row
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.errors import DataError

Ints = NDArray[np.integer]


class IndexMap(NamedTuple):
    """Sample i is row r = shuffle[i]; row r goes from samples[r] to samples[r + 1].

    documents  [D]          document numbers, in reading order over all epochs
    samples    [rows+1, 2]  (position in `documents`, token offset in that document) where each row begins; the last is a fence
    shuffle    [rows]       row of each sample
    cut                     rows begin and end inside documents and share a token with the next (packed)
    """

    documents: Ints
    samples: Ints
    shuffle: Ints
    cut: bool = False


def epochs_for(sizes: Ints, documents: tuple[int, int], seq_length: int, num_samples: int) -> int:
    """Fewest whole epochs over documents [first, last) that give `num_samples` packed rows, at least 1.

    >>> epochs_for(np.array([8, 9]), (0, 2), seq_length=4, num_samples=5)
    2
    """
    # rows = (tokens * epochs - 1) // s >= num_samples
    return max(-(-(num_samples * seq_length + 1) // max(_tokens(sizes, documents), 1)), 1)


def _tokens(sizes: Ints, documents: tuple[int, int]) -> int:
    return int(sizes[documents[0] : documents[1]].sum(dtype=np.int64))


def packed(sizes: Ints, documents: tuple[int, int], seq_length: int, seed: int, *, num_epochs: int = 1) -> IndexMap:
    """Cut the tape of shuffled documents into rows.

    sizes: [d] tokens per document; documents: range [first, last) to read.

    FORMAT: the order, and the dtypes, are those of the maps that earlier runs were trained on: one shuffle over the documents of all
    epochs, then one over all rows, from one RandomState.
    """
    first, last = documents
    tokens = _tokens(sizes, documents)
    rows = (tokens * num_epochs - 1) // seq_length
    if rows < 1:
        raise DataError(
            f"documents {first} to {last} hold {tokens} tokens, too few for one row of {seq_length + 1}",
            fix="use more data, a smaller seq_length, or another split",
        )
    rng = np.random.RandomState(seed)
    order: Ints = np.tile(np.arange(first, last, dtype=np.int32), num_epochs)
    rng.shuffle(order)
    ends = np.cumsum(sizes[order], dtype=np.int64)
    begins = np.arange(rows + 1, dtype=np.int64) * seq_length
    position = np.searchsorted(ends, begins, side="right")
    offset = begins - (ends[position] - sizes[order[position]])
    position[0] = offset[0] = 0
    wide = max(order.size, int(sizes[first:last].max())) > np.iinfo(np.int32).max
    samples: Ints = np.stack([position, offset], axis=1).astype(np.int64 if wide else np.int32)
    shuffle: Ints = np.arange(rows, dtype=np.uint32 if rows < np.iinfo(np.uint32).max - 1 else np.int64)
    rng.shuffle(shuffle)
    return IndexMap(order, samples, shuffle, cut=True)


def usable(sizes: Ints, trained: NDArray[np.bool_] | None, seq_length: int, allow_chopped: bool) -> NDArray[np.bool_]:
    """Which documents may become rows, [d]: those with something to train that fit (or may be chopped).

    trained: [d], from `trained_documents`; without labels every token is trained.
    """
    keep = sizes > 0 if trained is None else trained.copy()
    if not allow_chopped:
        keep &= sizes <= seq_length + 1
    return keep


def unpacked(keep: NDArray[np.bool_], documents: tuple[int, int], seed: int, *, num_samples: int, paired: bool = False) -> IndexMap:
    """One document per row: the usable documents over and over, in shuffled order of rows.

    keep: [d], from `usable`. paired: rows of pairs are folded back on the first (number of documents) rows.

    FORMAT: that fold is how earlier preference runs were ordered; without skipped documents it changes nothing, with them the first
    documents of the range come a little more often.
    """
    first, last = documents
    choice = first + np.flatnonzero(keep[first:last])
    _require_some(choice, documents)
    shuffle = np.arange(num_samples, dtype=np.int64)
    np.random.RandomState(seed).shuffle(shuffle)
    if paired:
        shuffle %= last - first
    return IndexMap(np.resize(choice, num_samples + 1), _whole(np.arange(num_samples + 1)), shuffle)


def pack_until_overflow(
    sizes: Ints, keep: NDArray[np.bool_], documents: tuple[int, int], seq_length: int, seed: int, *, num_samples: int
) -> IndexMap:
    """Greedy rows of whole documents; each epoch is shuffled again, and a row may go on from one epoch into the next.

    sizes: [d] tokens per document, for pairs the longer of the two; keep: [d], from `usable`.
    A document longer than a row has a row of its own and is chopped there.

    FORMAT: rows are shuffled first, documents (all of the range, usable or not) afterwards, from one RandomState. The
    last row has one document only.
    """
    first, last = documents
    _require_some(np.flatnonzero(keep[first:last]), documents)
    rng = np.random.RandomState(seed)
    shuffle = np.arange(num_samples, dtype=np.int64)
    rng.shuffle(shuffle)
    order = np.arange(first, last, dtype=np.int64)
    read: list[Ints] = [order[:0]]
    starts: list[Ints] = [order[:0]]
    rows = done = 0
    pending: Ints = order[:0]
    tokens = max(int(sizes[order].sum(where=keep[order], dtype=np.int64)), 1)
    while rows < num_samples:
        # About half of what is missing at a time, so that small data read for many epochs is not walked once per epoch.
        epochs = min((num_samples - rows) * seq_length // (2 * tokens), 2**22 // len(order)) + 1
        fresh = np.concatenate([_shuffled_again(order, rng) for _ in range(epochs)])
        fresh = fresh[keep[fresh]]
        pending = np.concatenate([pending, fresh])
        begins = _row_starts(sizes[pending], seq_length + 1)
        read.append(fresh)
        # The last row of the batch is still open: the next epoch may fill it.
        starts.append(begins[:-1] + done)
        rows += len(begins) - 1
        done += int(begins[-1])
        pending = pending[begins[-1] :]
    begins = np.concatenate(starts)[:num_samples]
    fences = np.append(begins, begins[-1:] + 1) if num_samples else np.zeros(1, np.int64)
    return IndexMap(np.concatenate(read)[: fences[-1]], _whole(fences), shuffle)


def _shuffled_again(order: Ints, rng: np.random.RandomState) -> Ints:
    rng.shuffle(order)
    return order.copy()


def _row_starts(lengths: Ints, capacity: int) -> Ints:
    """Where rows begin when documents are put in while the sum stays within capacity.

    >>> _row_starts(np.array([3, 2, 9, 1, 4]), capacity=5).tolist()
    [0, 2, 3]
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    overflowing = np.searchsorted(ends, ends - lengths + capacity, side="right")
    # A memoryview: its single reads are faster than an array's, and a list would cost much memory.
    following = np.maximum(overflowing, np.arange(1, len(lengths) + 1)).data
    starts, i = [0], following[0]
    while i < len(following):
        starts.append(i)
        i = following[i]
    return np.array(starts, dtype=np.int64)


def trained_documents(labels: NDArray[np.number], sizes: Ints, seq_length: int, *, block: int = 2**24) -> NDArray[np.bool_]:
    """Which documents have a trained token in their first row, [d].

    labels: all documents back to back; -100 (any negative) is not trained. The first token of a row is never a target.
    """
    ends = np.cumsum(sizes, dtype=np.int64)
    result = np.zeros(len(sizes), dtype=bool)
    i = 0
    while i < len(sizes):
        begin = int(ends[i] - sizes[i])
        j = max(int(np.searchsorted(ends, begin + block, side="right")), i + 1)
        trained = np.append(labels[begin : ends[j - 1]] >= 0, False)
        stop = np.minimum(ends[i:j] - begin, ends[i:j] - sizes[i:j] - begin + seq_length + 1)
        start = np.minimum(ends[i:j] - sizes[i:j] - begin + 1, stop)
        # reduceat gives the element at `start` for an empty range.
        some = np.logical_or.reduceat(trained, np.stack([start, stop], axis=1).reshape(-1))[::2]
        result[i:j] = some & (start < stop)
        i = j
    return result


def _whole(positions: Ints) -> Ints:
    return np.stack([positions, np.zeros_like(positions)], axis=1)


def _require_some(choice: Ints, documents: tuple[int, int]) -> None:
    if not len(choice):
        raise DataError(
            f"none of the documents {documents[0]} to {documents[1]} can be used: each is empty, wholly masked, or longer than a sample",
            fix="set allow_chopped: true, raise seq_length, or check the label files",
        )
