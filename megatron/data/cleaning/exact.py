# SPDX-License-Identifier: Apache-2.0
"""Stages `url` and `exact`: documents of the same address, or whose text is the same but for case and spaces; the earliest stays.

Knows no near duplicates. Every task writes its hashes as one sorted run; ranges of hashes are then compared across the runs: memory is
bounded by the largest range.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron.data.cleaning.document import Document, look_up

RANGES = 16
HALF = 64


def exact_hash(text: str) -> int:
    """128 bits of the text in lower case, runs of spaces as one.

    >>> exact_hash("A  b\\n") == exact_hash("a B")
    True
    """
    return xxhash.xxh128_intdigest(" ".join(text.lower().split()).encode())


def same_address(url: str) -> str:
    """What two addresses of the same page share: scheme, fragment, the case of the host and a last slash say nothing.

    >>> same_address("https://Site.org/A/#top") == same_address("http://site.org/A")
    True
    """
    plain = url.strip().partition("#")[0].partition("://")
    host, sign, path = (plain[2] or plain[0]).partition("/")
    return (host.lower() + sign + path).rstrip("/")


@dataclass(frozen=True)
class Fingerprint:
    """Step: writes a task's hashes as a sorted run of three rows: upper half, lower half, number of the document.

    url_key: the field whose address is hashed, None: the text is; a document without an address has no hash
    """

    folder: str
    url_key: str | None = None

    def __call__(self, data: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        """Passes the documents on unchanged."""
        upper, lower, numbers = array("Q"), array("Q"), array("Q")
        for number, document in enumerate(data):
            value = self._hash(document)
            if value is not None:
                upper.append(value >> HALF)
                lower.append(value & ((1 << HALF) - 1))
                numbers.append(number)
            yield document
        run = np.stack([np.asarray(upper), np.asarray(lower), np.asarray(numbers)]).astype(np.uint64)
        path = Path(self.folder) / f"{rank:05d}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, run[:, np.lexsort(run[::-1])])

    def _hash(self, document: Document) -> int | None:
        if self.url_key is None:
            return exact_hash(document.text)
        url = look_up(document.record, self.url_key)
        return xxhash.xxh128_intdigest(same_address(url).encode()) if isinstance(url, str) and url.strip() else None


@dataclass(frozen=True)
class FindSame:
    """Step of RANGES tasks: (task, number) of all but the earliest of equal documents, among one range of hashes."""

    runs: str
    removed: str

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """Reads every run's part of the range, writes one file."""
        low = rank * ((1 << HALF) // world_size)
        high = (rank + 1) * ((1 << HALF) // world_size) - 1 if rank + 1 < world_size else (1 << HALF) - 1
        parts = [_in_range(path, low, high) for path in sorted(Path(self.runs).glob("*.npy"))]
        found = np.concatenate(parts, axis=1) if parts else np.zeros((4, 0), dtype=np.uint64)
        found = found[:, np.lexsort(found[::-1])]
        same = np.zeros(found.shape[1], dtype=bool)
        same[1:] = (found[:2, 1:] == found[:2, :-1]).all(axis=0)
        folder = Path(self.removed)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{rank:05d}.npy", found[2:, same].T.astype(np.int64))


def _in_range(path: Path, low: int, high: int) -> NDArray[np.uint64]:
    """Rows upper, lower, task, number of one run's hashes from `low` to `high`."""
    run = np.load(path, mmap_mode="r", allow_pickle=False)
    first = int(np.searchsorted(run[0], np.uint64(low), side="left"))
    last = int(np.searchsorted(run[0], np.uint64(high), side="right"))
    task = np.full(last - first, int(path.stem), dtype=np.uint64)
    return np.stack([run[0, first:last], run[1, first:last], task, run[2, first:last]])
