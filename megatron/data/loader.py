# SPDX-License-Identifier: Apache-2.0
"""One split as this rank reads it: samples in sampler order, collated, read ahead by threads. Samples may be left out.

A position is a count of samples over all ranks, those left out not counted; a number is a sample's place in the data.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.data.blend import Dataset
from megatron.data.streams import Item
from megatron.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron.data.batch import Batch


Collate = Callable[[Sequence[Item]], "Batch"]
READ_AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class DataSplit:
    """The train, valid or test data of one data-parallel rank.

    dataset:          the whole split, the same on every rank
    micro_batch_size: samples per micro batch and rank
    rank, size:       data-parallel
    num_workers:      threads that read ahead, READ_AHEAD micro batches each; 0 = read when asked. The order is the same for any number.
                      Threads, not processes: reading is a copy out of mapped files, and nothing is forked beside torch's threads.
    wrap:             start over at the end (valid, test); otherwise the end is an error
    """

    name: str
    dataset: Dataset
    micro_batch_size: int
    rank: int = 0
    size: int = 1
    num_workers: int = 0
    wrap: bool = False

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, collate: Collate, start_sample: int = 0, skipped: Skipped | None = None) -> Iterator[Batch]:
        """This rank's micro batches from `start_sample` (a count over all ranks of those read before) on.

        skipped: samples that are left out, and that `start_sample` does not count
        Without `wrap` the built length ends with a DataError at the first micro batch that does not fit.
        """
        skipped = skipped or Skipped()
        stop = None if self.wrap else skipped.positions(len(self))
        plan = micro_batches(start_sample, stop, micro_batch_size=self.micro_batch_size, rank=self.rank, size=self.size)

        def make(positions: range) -> Batch:
            return collate(self.items([skipped.number(position) for position in positions]))

        yield from read_ahead(plan, make, self.num_workers)
        raise DataError(
            f"the {self.name} data ends: {len(self)} samples were built, and the next micro batch needs more",
            where=f"{self.name} data",
            fix="the data is sized by train_iters (or train_epochs) at start: raise it and start again from the last checkpoint",
        )

    def items(self, numbers: Sequence[int]) -> list[Item]:
        """The samples of global numbers, counted on from the start again where the split wraps."""
        return [self.dataset[number % len(self) if self.wrap else number] for number in numbers]


def read_ahead(plan: Iterator[range], make: Callable[[range], Batch], num_workers: int) -> Iterator[Batch]:
    """`make` of each entry of `plan`, in order, begun by threads before it is asked for."""
    if num_workers < 1:
        yield from map(make, plan)
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="data")
    try:
        waiting: deque[Future[Batch]] = deque()
        for numbers in plan:
            waiting.append(pool.submit(make, numbers))
            if len(waiting) > READ_AHEAD * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def micro_batches(start: int, stop: int | None, *, micro_batch_size: int, rank: int, size: int) -> Iterator[range]:
    """This rank's micro batches, one after the other, as ranges of global sample numbers.

    Global micro batch k covers the samples [start + k m size, start + (k + 1) m size), m the micro batch size, and rank r its r-th
    slice of m. So a step of B samples that begins at j B covers [j B, (j + 1) B) whatever the ranks, the micro batch and the
    accumulation are, and a run that goes on from any count sees what it would have seen uninterrupted.

    stop: samples there are; a global micro batch that is not wholly below it is not given. None: without end.

    >>> list(micro_batches(0, 9, micro_batch_size=2, rank=1, size=2))
    [range(2, 4), range(6, 8)]
    """
    if start < 0 or micro_batch_size < 1 or not 0 <= rank < size:
        raise ConfigError(f"no micro batches for start {start}, micro batch size {micro_batch_size}, rank {rank} of {size}")
    stride = micro_batch_size * size
    while stop is None or start + stride <= stop:
        first = start + rank * micro_batch_size
        yield range(first, first + micro_batch_size)
        start += stride


@dataclass(frozen=True)
class Skipped:
    """Ranges [start, end) of sample numbers, in order, that do not touch.

    >>> skipped = Skipped().with_ranges([(8, 12), (4, 6)])
    >>> [skipped.number(position) for position in range(8)]
    [0, 1, 2, 3, 6, 7, 12, 13]
    >>> skipped.numbers(2, 7)
    [(2, 4), (6, 8), (12, 13)]
    """

    ranges: tuple[tuple[int, int], ...] = ()

    def with_ranges(self, more: Iterable[tuple[int, int]]) -> Skipped:
        """These and more."""
        joined: list[tuple[int, int]] = []
        for start, end in sorted([*self.ranges, *more]):
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            elif start < end:
                joined.append((start, end))
        return Skipped(tuple(joined))

    def number(self, position: int) -> int:
        """The number of the sample at a position."""
        for start, end in self.ranges:
            if position < start:
                break
            position += end - start
        return position

    def numbers(self, start: int, end: int) -> list[tuple[int, int]]:
        """The numbers of the samples at positions [start, end), as ranges [start, end)."""
        found: list[tuple[int, int]] = []
        position, number = 0, 0  # where the samples between two ranges begin
        for low, high in (*self.ranges, (None, 0)):
            length = end if low is None else low - number
            first, last = max(start, position), min(end, position + length)
            if first < last:
                found.append((number + first - position, number + last - position))
            position, number = position + length, high
        return found

    def positions(self, size: int) -> int:
        """How many positions `size` samples have."""
        return size - sum(max(0, min(end, size) - start) for start, end in self.ranges)
