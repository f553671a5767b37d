# SPDX-License-Identifier: Apache-2.0
"""Splitting and joining are inverse, and modules speak for their own parameters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megatron.errors import ConfigError
from megatron.mpu.groups import Group
from megatron.mpu.layers import ColumnLinear, RowLinear, VocabEmbedding
from megatron.mpu.sharding import Replicated, Split, Summed, join, sharding_of, split


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from([1, 2, 4]),
    dim=st.integers(0, 1),
    parts=st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=3),
    stated=st.booleans(),
)
def test_join_inverts_split(size: int, dim: int, parts: list[int], stated: bool) -> None:
    shape = [3, 3]
    shape[dim] = sum(parts)
    whole = torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape)
    for how in (Split(dim, tuple(parts) if stated else None), Replicated(), Summed()):
        shards = [split(whole, how, rank, size) for rank in range(size)]
        assert torch.equal(join(shards, how), whole)


def test_each_part_is_cut_by_itself() -> None:
    how = Split(0, parts=(4, 2, 2))
    assert split(torch.arange(8), how, 0, 2).tolist() == [0, 1, 4, 6]
    assert split(torch.arange(8), how, 1, 2).tolist() == [2, 3, 5, 7]
    with pytest.raises(ConfigError, match="cannot be divided"):
        split(torch.arange(9), Split(0), 0, 2)


def test_modules_state_their_sharding_on_the_meta_device() -> None:
    tp = Group.single()
    with torch.device("meta"):
        model = nn.ModuleDict(
            {
                "embed": VocabEmbedding(8, 4, tp=tp),
                "up": ColumnLinear(4, 8, tp=tp, parts=(4, 4)),
                "down": RowLinear(8, 4, tp=tp),
                "share": RowLinear(8, 4, tp=tp, defer_reduce=True),
                "norm": nn.LayerNorm(4),
            }
        )
    assert sharding_of(model) == {
        "embed.weight": Split(0),
        "up.weight": Split(0, (4, 4)),
        "up.bias": Split(0, (4, 4)),
        "down.weight": Split(1),
        "down.bias": Replicated(),
        "share.weight": Split(1),
        "share.bias": Summed(),
        "norm.weight": Replicated(),
        "norm.bias": Replicated(),
    }
