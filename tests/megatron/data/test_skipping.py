# SPDX-License-Identifier: Apache-2.0
"""Samples left out are read by nobody, all others once and in their order."""

from __future__ import annotations

from itertools import islice
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from megatron.data.loader import DataSplit, Skipped

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
