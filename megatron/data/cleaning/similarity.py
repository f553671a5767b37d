# SPDX-License-Identifier: Apache-2.0
"""Exact similarity of documents that MinHash proposed as near duplicates. Knows pairs as (task, number) twice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.data.cleaning.document import Document
from megatron.data.cleaning.words import hash_runs, hash_words, plain_words


def shingles(text: str, ngram: int) -> NDArray[np.uint64]:
    """Sorted numbers of the different runs of `ngram` words."""
    return np.unique(hash_runs(hash_words(plain_words(text)), ngram))


def jaccard(left: NDArray[np.uint64], right: NDArray[np.uint64]) -> float:
    """Shared shingles over all shingles.

    >>> jaccard(shingles("a b c d", 2), shingles("a b c e", 2))
    0.5
    """
    shared = len(np.intersect1d(left, right, assume_unique=True))
    together = len(left) + len(right) - shared
    return shared / together if together else 0.0


def read_pairs(folder: Path) -> NDArray[np.int64]:
    """[pairs, 4] of (task, number, task, number), each pair once, sorted."""
    found = [np.fromfile(path, dtype="<u4").reshape(-1, 4) for path in sorted(folder.glob("*.dups"))]
    pairs = np.concatenate(found).astype(np.int64) if found else np.zeros((0, 4), dtype=np.int64)
    return np.unique(pairs, axis=0)


@dataclass(frozen=True)
class StoreShingles:
    """Step: writes the shingles of a task's documents that are in any pair."""

    pairs: str
    stored: str
    folder: str
    ngram: int

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """Two files: numbers of the documents and where their shingles end, and the shingles."""
        pairs = read_pairs(Path(self.pairs))
        wanted = set(pairs[pairs[:, 0] == rank, 1].tolist()) | set(pairs[pairs[:, 2] == rank, 3].tolist())
        numbers, ends, parts = [], [], []
        total = 0
        with (Path(self.stored) / f"{rank:05d}.jsonl").open("rb") as file:
            for number, line in enumerate(file):
                if number in wanted:
                    parts.append(shingles(Document.unpack(line).text, self.ngram))
                    total += len(parts[-1])
                    numbers.append(number)
                    ends.append(total)
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{rank:05d}.ends.npy", np.array([numbers, ends], dtype=np.int64))
        np.save(folder / f"{rank:05d}.shingles.npy", np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64))


class Similarities:
    """Reads what StoreShingles wrote, a task's files when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tasks: dict[int, tuple[dict[int, tuple[int, int]], NDArray[np.uint64]]] = {}

    def _of(self, task: int, number: int) -> NDArray[np.uint64]:
        if task not in self.tasks:
            numbers, ends = np.load(self.folder / f"{task:05d}.ends.npy", allow_pickle=False).tolist()
            spans = dict(zip(numbers, zip([0, *ends[:-1]], ends, strict=True), strict=True))
            self.tasks[task] = spans, np.load(self.folder / f"{task:05d}.shingles.npy", mmap_mode="r", allow_pickle=False)
        spans, values = self.tasks[task]
        start, end = spans[number]
        return values[start:end]

    def alike(self, pairs: NDArray[np.int64], least: float) -> NDArray[np.bool_]:
        """Which pairs' similarity is `least` or more."""
        return np.array([jaccard(self._of(a, b), self._of(c, d)) >= least for a, b, c, d in pairs.tolist()], dtype=bool)
