# SPDX-License-Identifier: Apache-2.0
"""Stage `near`: from pairs of documents that share a MinHash band to the one of each group that stays. Knows no hashing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.data.cleaning.similarity import Similarities, read_pairs

TASK_BITS = 32


class Keep(Enum):
    """Which document of a group of near duplicates stays."""

    LONGEST = "longest"
    EARLIEST = "earliest"


@dataclass(frozen=True)
class ChooseNear:
    """Step of one task: joins pairs to groups (union-find) and writes (task, number) of all but one of each.

    pairs: folder of .dups files, four little-endian 32-bit numbers a pair; stored: folder with the documents' lengths
    shingles: folder for checking that pairs are `least` alike, None: the shared band is enough
    """

    pairs: str
    stored: str
    removed: str
    keep: Keep
    shingles: str | None = None
    least: float = 0.0

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """Reads all pairs, writes one file."""
        pairs = read_pairs(Path(self.pairs))
        if self.shingles is not None:
            pairs = pairs[Similarities(Path(self.shingles)).alike(pairs, self.least)]
        left = (pairs[:, 0] << TASK_BITS) | pairs[:, 1]
        right = (pairs[:, 2] << TASK_BITS) | pairs[:, 3]
        documents = np.unique(np.concatenate([left, right]))
        left, right = np.searchsorted(documents, left), np.searchsorted(documents, right)
        groups = join(len(documents), zip(left.tolist(), right.tolist(), strict=True))
        weight = self._lengths(documents) if self.keep is Keep.LONGEST else np.zeros(len(documents), dtype=np.int64)
        # Sorted by group, the longest first, then the earliest: all but the first of each group go.
        order = np.lexsort([np.arange(len(documents)), -weight, groups])
        again = np.zeros(len(order), dtype=bool)
        again[1:] = groups[order][1:] == groups[order][:-1]
        gone = np.sort(documents[order[again]])
        folder = Path(self.removed)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "00000.npy", np.stack([gone >> TASK_BITS, gone & ((1 << TASK_BITS) - 1)], axis=1))

    def _lengths(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        lengths = np.zeros(len(documents), dtype=np.int64)
        tasks = documents >> TASK_BITS
        for task in np.unique(tasks).tolist():
            mine = tasks == task
            known = np.load(Path(self.stored) / f"{task:05d}.lengths.npy", mmap_mode="r", allow_pickle=False)
            lengths[mine] = known[documents[mine] & ((1 << TASK_BITS) - 1)]
        return lengths


def join(count: int, pairs: Iterable[tuple[int, int]]) -> NDArray[np.int64]:
    """Group of each of `count` things of which pairs belong together: the smallest number in it.

    >>> join(5, [(3, 4), (0, 2), (4, 2)]).tolist()
    [0, 1, 0, 0, 0]
    """
    parent = list(range(count))

    def root(thing: int) -> int:
        while parent[thing] != thing:
            parent[thing] = parent[parent[thing]]
            thing = parent[thing]
        return thing

    for left, right in pairs:
        a, b = root(left), root(right)
        parent[max(a, b)] = min(a, b)
    return np.array([root(thing) for thing in range(count)], dtype=np.int64)
