# SPDX-License-Identifier: Apache-2.0
"""Aligned token files read together: sample number -> one array per stream.

Streams: `text`, `pos`, `neg` are tokens; `label`, `pos_label`, `neg_label` say which tokens are trained (-100: not); `reward` is one
number per document; `ref`, `pos_ref`, `neg_ref` are log-probs per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from megatron.data.index_map import IndexMap
from megatron.data.indexed_dataset import IndexedDataset
from megatron.errors import DataError

Item = dict[str, NDArray[np.generic]]
IGNORED = -100
MAINS = ("text", "pos", "neg")


class StreamKind(Enum):
    """What a stream holds."""

    TOKENS = "tokens"
    LABEL = "label"
    REWARD = "reward"
    REF = "ref"


# dtype and padding of a kind's arrays
ROW: dict[StreamKind, tuple[type[np.number], int]] = {
    StreamKind.TOKENS: (np.int64, 0),
    StreamKind.LABEL: (np.int64, IGNORED),
    StreamKind.REWARD: (np.float32, 0),
    StreamKind.REF: (np.float32, 0),
}


def kind_of(stream: str) -> StreamKind:
    """What a stream holds, by its name."""
    if stream in MAINS:
        return StreamKind.TOKENS
    last = stream.rsplit("_", 1)[-1]
    if last not in ("label", "reward", "ref") or stream.count("_") > 1:
        raise DataError(f"stream {stream!r} is not known", fix="text, pos, neg, or [pos_|neg_]label, reward, ref")
    return StreamKind(last)


def main_of(stream: str) -> str:
    """The token stream that a stream belongs to.

    >>> [main_of(name) for name in ("label", "pos_ref", "neg")]
    ['text', 'pos', 'neg']
    """
    first = stream.split("_", 1)[0]
    return first if first in MAINS else "text"


def segment_ids_of(stream: str) -> str:
    """The key under which the document numbers of a token stream stand in an item."""
    return "segment_ids" if stream == "text" else f"{stream}_segment_ids"


def check_aligned(streams: Mapping[str, IndexedDataset]) -> None:
    """DataError unless every stream has its token stream's documents: as many, and as long (a reward: one number each)."""
    for name, dataset in streams.items():
        main, kind = streams[main_of(name)], kind_of(name)
        if len(dataset) != len(main):
            raise _misaligned(name, dataset, f"{len(dataset)} documents beside {len(main)}", main)
        if kind is StreamKind.REWARD:
            if len(dataset) and not (dataset.sizes == 1).all():
                raise _misaligned(name, dataset, "more or less than one number for a document", main)
        elif not np.array_equal(dataset.sizes, main.sizes):
            first = int(np.flatnonzero(dataset.sizes != main.sizes)[0])
            raise _misaligned(name, dataset, f"document {first} has {dataset.sizes[first]} values beside {main.sizes[first]} tokens", main)
        if kind in (StreamKind.TOKENS, StreamKind.LABEL) and dataset.dtype.kind == "f":
            raise DataError(f"stream {name} holds {dataset.dtype}, not token ids", where=dataset.prefix, fix="check the order of the paths")
    if "pos" in streams and "neg" in streams and len(streams["pos"]) != len(streams["neg"]):
        raise _misaligned("neg", streams["neg"], f"{len(streams['neg'])} documents beside {len(streams['pos'])}", streams["pos"])


def _misaligned(name: str, dataset: IndexedDataset, what: str, main: IndexedDataset) -> DataError:
    return DataError(
        f"stream {name} does not fit: {what}",
        where=f"{dataset.prefix} and {main.prefix}",
        fix="write both in one run of the preprocessing tool",
    )


class StreamDataset:
    """Items of s + 1 values per stream, aligned with each other, plus the document number of each token.

    Item: each stream -> [s+1] (tokens and labels int64, rewards and refs float32); `segment_ids` (`pos_segment_ids`,
    `neg_segment_ids`) int32 [s+1], counting documents in the row from 0, padding being one more document.
    Padding: 0 for tokens, rewards and refs, -100 for labels.
    Rows longer than s + 1 are cut.

    all_trained: label streams wanted for which there is no file: their labels are the tokens.
    length: items offered; FORMAT: by default one less than the map has rows, as earlier runs never read the last.
    """

    def __init__(
        self,
        streams: Mapping[str, IndexedDataset],
        index: IndexMap,
        seq_length: int,
        *,
        all_trained: tuple[str, ...] = (),
        length: int | None = None,
    ) -> None:
        self.streams, self.index, self.seq_length = dict(streams), index, seq_length
        self._kinds = {name: kind_of(name) for name in self.streams}
        self._all_trained = all_trained
        self._length = max(len(index.shuffle) - 1, 0) if length is None else length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self._length:
            raise IndexError(index)
        pieces = self.pieces(int(self.index.shuffle[index]))
        lengths = {name: self._lengths(name, pieces) for name, kind in self._kinds.items() if kind is StreamKind.TOKENS}
        item: Item = {name: self._read(name, pieces, lengths[main_of(name)]) for name in self.streams}
        for name, counts in lengths.items():
            segments = [*counts, self.seq_length + 1 - sum(counts)]
            item[segment_ids_of(name)] = np.repeat(np.arange(len(segments), dtype=np.int32), segments)
        for name in self._all_trained:
            present = sum(lengths[main_of(name)])
            item[name] = item[main_of(name)].copy()
            item[name][present:] = IGNORED
        return item

    def pieces(self, row: int) -> list[tuple[int, int, int | None]]:
        """The (document, offset, stop) a row is made of; stop None: to the end of the document."""
        (first, offset), (last, stop) = self.index.samples[row].tolist(), self.index.samples[row + 1].tolist()
        if not self.index.cut:
            return [(document, 0, None) for document in self.index.documents[first:last].tolist()]
        documents = self.index.documents[first : last + 1].tolist()
        starts: list[int] = [offset] + [0] * (last - first)
        stops: list[int | None] = [*[None] * (last - first), stop + 1]
        return list(zip(documents, starts, stops, strict=True))

    def _read(self, name: str, pieces: list[tuple[int, int, int | None]], lengths: list[int]) -> NDArray[np.generic]:
        """One stream's values of the pieces, [s+1]."""
        dataset, kind = self.streams[name], self._kinds[name]
        dtype, padding = ROW[kind]
        row = np.full(self.seq_length + 1, padding, dtype=dtype)
        filled = 0
        for (document, start, _), length in zip(pieces, lengths, strict=True):
            if kind is StreamKind.REWARD:
                row[filled : filled + length] = dataset.get(document)[0]
            else:
                row[filled : filled + length] = dataset.get(document, start, length)
            filled += length
        return row

    def _lengths(self, main: str, pieces: list[tuple[int, int, int | None]]) -> list[int]:
        """Values that each piece puts into a row of s + 1."""
        sizes, room, lengths = self.streams[main].sizes, self.seq_length + 1, []
        for document, start, stop in pieces:
            lengths.append(min((sizes.item(document) if stop is None else stop) - start, room))
            room -= lengths[-1]
        return lengths
