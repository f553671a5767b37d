# SPDX-License-Identifier: Apache-2.0
"""Ranks and places are two names of one thing, and every axis cuts the world into disjoint groups."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.errors import ConfigError
from megatron.mpu.groups import AXES, Topology

sizes = st.integers(1, 5)


@settings(max_examples=50, deadline=None)
@given(pipe=sizes, data=sizes, tensor=sizes)
def test_place_inverts_rank_and_groups_partition_the_world(pipe: int, data: int, tensor: int) -> None:
    grid = Topology(pipe=pipe, data=data, tensor=tensor)
    assert [grid.rank(grid.place(rank)) for rank in range(grid.world)] == list(range(grid.world))
    for axis in AXES:
        groups = grid.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(grid.world))
        assert all(len(group) == grid.size(axis) for group in groups)
        assert all(grid.members(axis, rank) == group for group in groups for rank in group)


def test_tensor_ranks_are_neighbours_and_stages_are_far_apart() -> None:
    grid = Topology.of_world(8, pipe=2, tensor=2)
    assert grid.groups("tensor") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert grid.groups("data") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert grid.groups("pipe") == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_world_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="6 processes cannot be divided"):
        Topology.of_world(6, pipe=2, tensor=2)
    with pytest.raises(ConfigError):
        Topology(pipe=0)
