# SPDX-License-Identifier: Apache-2.0
"""One split as this rank reads it: samples in sampler order, collated, read ahead by threads. Knows no files."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.data.blend import Dataset
from megatron.data.sampler import micro_batches
from megatron.data.skipping import Skipped
from megatron.data.streams import Item
from megatron.errors import DataError

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
