# SPDX-License-Identifier: Apache-2.0
"""Which samples a data-parallel rank reads, in which order. A position is a count of samples over all ranks."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.errors import ConfigError


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
