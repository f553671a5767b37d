# SPDX-License-Identifier: Apache-2.0
"""The order of samples does not depend on how a step is divided, where a run was interrupted, or what is left out."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.loader import DataSplit, Skipped, micro_batches
from megatron.errors import ConfigError


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 5), micro=st.integers(1, 5), accumulation=st.integers(1, 4), step=st.integers(0, 9), steps=st.integers(1, 4))
def test_steps_cover_consecutive_ranges(size: int, micro: int, accumulation: int, step: int, steps: int) -> None:
    batch = size * micro * accumulation
    seen: list[int] = []
    ranks = [micro_batches(step * batch, None, micro_batch_size=micro, rank=rank, size=size) for rank in range(size)]
    for _ in range(steps):
        seen += sorted(number for rank in ranks for numbers in islice(rank, accumulation) for number in numbers)
    assert seen == list(range(step * batch, (step + steps) * batch))
    for rank in range(size):
        whole = list(islice(micro_batches(0, None, micro_batch_size=micro, rank=rank, size=size), (step + steps) * accumulation))
        resumed = micro_batches(step * batch, None, micro_batch_size=micro, rank=rank, size=size)
        assert list(islice(resumed, steps * accumulation)) == whole[step * accumulation :]


def test_only_whole_global_micro_batches_are_given() -> None:
    for rank in range(3):
        assert list(micro_batches(1, 12, micro_batch_size=2, rank=rank, size=3)) == [range(1 + 2 * rank, 3 + 2 * rank)]
    with pytest.raises(ConfigError):
        next(micro_batches(0, None, micro_batch_size=2, rank=3, size=3))


ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8)).map(lambda pair: (pair[0], pair[0] + pair[1])), max_size=5)


@given(ranges, ranges)
def test_positions_are_the_samples_that_are_left(first: list[tuple[int, int]], more: list[tuple[int, int]]) -> None:
    skipped = Skipped().with_ranges(first).with_ranges(more)
    out = {number for start, end in [*first, *more] for number in range(start, end)}
    left = [number for number in range(100) if number not in out]
    assert [skipped.number(position) for position in range(len(left))] == left
    assert skipped.positions(100) == len(left)
    assert [number for start, end in skipped.numbers(3, 40) for number in range(start, end)] == left[3:40]
    assert skipped == Skipped().with_ranges([*more, *first])


def test_a_split_leaves_them_out_whatever_the_ranks_are() -> None:
    numbers: Any = range(40)
    skipped = Skipped(((6, 10), (20, 21)))

    def read(start: int, count: int, size: int, micro: int) -> list[int]:
        splits = [DataSplit(name="train", dataset=numbers, micro_batch_size=micro, rank=rank, size=size) for rank in range(size)]
        streams = [split.batches(list, start_sample=start, skipped=skipped) for split in splits]  # type: ignore[arg-type]
        rows = zip(*(islice(stream, count // (size * micro)) for stream in streams), strict=True)
        return [number for row in rows for batch in row for number in batch]  # type: ignore[attr-defined]

    left = [number for number in range(40) if number not in {6, 7, 8, 9, 20}]
    assert read(0, 32, 1, 4) == read(0, 32, 2, 2) == left[:32]
    assert read(4, 24, 2, 1) == left[4:28]
