# SPDX-License-Identifier: Apache-2.0
"""The order of samples does not depend on how a step is divided, nor on where a run was interrupted."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.loader import micro_batches
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
