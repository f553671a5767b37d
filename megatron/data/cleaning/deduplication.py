# SPDX-License-Identifier: Apache-2.0
"""Stages `url`, `exact` and `near`: which documents are the same, or nearly so, and which of them stays.

url, exact: documents of the same address, or whose text is the same but for case and spaces; the earliest stays. Every task writes its
            hashes as one sorted run; ranges of hashes are then compared across the runs: memory is bounded by the largest range.
near:       pairs of documents that share a MinHash band, checked for their similarity where that is asked for, are joined to groups, of
            which one document stays.

The functions with `data`, `rank` and `world_size` are steps of an executor's pipeline. `folder` is that of the stage: it holds the
documents (see pipeline.store), what the steps pass on to each other, and `removed`, the (task, number) of the documents that go.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron.data.cleaning.document import Document, look_up, new_file
from megatron.data.cleaning.words import hash_runs, hash_words, plain_words

RANGES = 16
HALF = 64
TASK_BITS = 32


class Keep(Enum):
    """Which document of a group of near duplicates stays."""

    LONGEST = "longest"
    EARLIEST = "earliest"


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


def write_hashes(data: Iterable[Document], rank: int, world_size: int, *, folder: Path, url_key: str | None = None) -> Iterator[Document]:
    """Write a task's hashes as a sorted run of three rows: upper half, lower half, number of the document. The documents pass unchanged.

    url_key: the field whose address is hashed, None: the text is; a document without an address has no hash
    """
    upper, lower, numbers = array("Q"), array("Q"), array("Q")
    for number, document in enumerate(data):
        value = exact_hash(document.text) if url_key is None else _hash_address(look_up(document.record, url_key))
        if value is not None:
            upper.append(value >> HALF)
            lower.append(value & ((1 << HALF) - 1))
            numbers.append(number)
        yield document
    run = np.stack([np.asarray(upper), np.asarray(lower), np.asarray(numbers)]).astype(np.uint64)
    np.save(new_file(folder / "runs", f"{rank:05d}.npy"), run[:, np.lexsort(run[::-1])])


def _hash_address(url: object) -> int | None:
    return xxhash.xxh128_intdigest(same_address(url).encode()) if isinstance(url, str) and url.strip() else None


def find_same(data: object, rank: int, world_size: int, *, folder: Path) -> None:
    """Of RANGES tasks: write all but the earliest of equal documents, among one range of the hashes."""
    low = rank * ((1 << HALF) // world_size)
    high = (rank + 1) * ((1 << HALF) // world_size) - 1 if rank + 1 < world_size else (1 << HALF) - 1
    parts = [_in_range(path, low, high) for path in sorted((folder / "runs").glob("*.npy"))]
    found = np.concatenate(parts, axis=1) if parts else np.zeros((4, 0), dtype=np.uint64)
    found = found[:, np.lexsort(found[::-1])]
    same = np.zeros(found.shape[1], dtype=bool)
    same[1:] = (found[:2, 1:] == found[:2, :-1]).all(axis=0)
    np.save(new_file(folder / "removed", f"{rank:05d}.npy"), found[2:, same].T.astype(np.int64))


def _in_range(path: Path, low: int, high: int) -> NDArray[np.uint64]:
    """Rows upper, lower, task, number of one run's hashes from `low` to `high`."""
    run = np.load(path, mmap_mode="r", allow_pickle=False)
    first = int(np.searchsorted(run[0], np.uint64(low), side="left"))
    last = int(np.searchsorted(run[0], np.uint64(high), side="right"))
    task = np.full(last - first, int(path.stem), dtype=np.uint64)
    return np.stack([run[0, first:last], run[1, first:last], task, run[2, first:last]])


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
    found = [np.fromfile(path, dtype="<u4").reshape(-1, 4) for path in sorted((folder / "pairs").glob("*.dups"))]
    pairs = np.concatenate(found).astype(np.int64) if found else np.zeros((0, 4), dtype=np.int64)
    return np.unique(pairs, axis=0)


def store_shingles(data: object, rank: int, world_size: int, *, folder: Path, ngram: int) -> None:
    """Write the shingles of a task's documents that are in any pair: their numbers and where their shingles end, and the shingles."""
    pairs = read_pairs(folder)
    wanted = set(pairs[pairs[:, 0] == rank, 1].tolist()) | set(pairs[pairs[:, 2] == rank, 3].tolist())
    numbers: list[int] = []
    parts = [np.zeros(0, dtype=np.uint64)]
    with (folder / "documents" / f"{rank:05d}.jsonl").open("rb") as file:
        for number, line in enumerate(file):
            if number in wanted:
                parts.append(shingles(Document.unpack(line).text, ngram))
                numbers.append(number)
    ends = np.cumsum([len(part) for part in parts[1:]], dtype=np.int64)
    np.save(new_file(folder / "shingles", f"{rank:05d}.ends.npy"), np.stack([np.array(numbers, dtype=np.int64), ends]))
    np.save(new_file(folder / "shingles", f"{rank:05d}.shingles.npy"), np.concatenate(parts))


def _alike(folder: Path, pairs: NDArray[np.int64], least: float) -> NDArray[np.bool_]:
    """Which pairs' similarity is `least` or more, by what `store_shingles` wrote."""
    found: dict[tuple[int, int], NDArray[np.uint64]] = {}
    for task in np.unique(pairs[:, ::2]).tolist():
        numbers, ends = np.load(folder / "shingles" / f"{task:05d}.ends.npy", allow_pickle=False).tolist()
        values = np.load(folder / "shingles" / f"{task:05d}.shingles.npy", mmap_mode="r", allow_pickle=False)
        for number, start, end in zip(numbers, [0, *ends], ends, strict=False):
            found[task, number] = np.asarray(values[start:end])
    return np.array([jaccard(found[a, b], found[c, d]) >= least for a, b, c, d in pairs.tolist()], dtype=bool)


def choose_near(data: object, rank: int, world_size: int, *, folder: Path, keep: Keep, least: float | None = None) -> None:
    """Of one task: join pairs to groups (union-find), and write all but one document of each.

    Reads files *.dups of four little-endian 32-bit numbers a pair, and the documents' lengths.
    least: pairs must be as alike as this, by the shingles stored; None: the shared band is enough
    """
    pairs = read_pairs(folder)
    if least is not None:
        pairs = pairs[_alike(folder, pairs, least)]
    left = (pairs[:, 0] << TASK_BITS) | pairs[:, 1]
    right = (pairs[:, 2] << TASK_BITS) | pairs[:, 3]
    documents = np.unique(np.concatenate([left, right]))
    left, right = np.searchsorted(documents, left), np.searchsorted(documents, right)
    groups = join(len(documents), zip(left.tolist(), right.tolist(), strict=True))
    tasks, numbers = documents >> TASK_BITS, documents & ((1 << TASK_BITS) - 1)
    weight = np.zeros(len(documents), dtype=np.int64)
    if keep is Keep.LONGEST:
        for task in np.unique(tasks).tolist():
            lengths = np.load(folder / "documents" / f"{task:05d}.lengths.npy", mmap_mode="r", allow_pickle=False)
            weight[tasks == task] = lengths[numbers[tasks == task]]
    # Sorted by group, the longest first, then the earliest: all but the first of each group go.
    order = np.lexsort([np.arange(len(documents)), -weight, groups])
    again = np.zeros(len(order), dtype=bool)
    again[1:] = groups[order][1:] == groups[order][:-1]
    gone = np.sort(order[again])
    np.save(new_file(folder / "removed", f"{rank:05d}.npy"), np.stack([tasks[gone], numbers[gone]], axis=1))


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
