# SPDX-License-Identifier: Apache-2.0
"""Every position of a sequence is on one rank, and ranks have as much to do; lengths that cannot be cut are refused."""

from __future__ import annotations

import doctest

import pytest
import torch

from megatron.errors import ConfigError
from megatron.mpu import context
from megatron.mpu.context import ContextKind, ContextPlan
from megatron.mpu.groups import Group


@pytest.mark.parametrize("kind", list(ContextKind))
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ranks_share_a_sequence(kind: ContextKind, size: int) -> None:
    length = 60
    plans = [ContextPlan(Group(rank, size), kind) for rank in range(size)]
    rows = [plan.rows(length) for plan in plans]
    assert torch.cat(rows).sort().values.tolist() == list(range(length))
    for rank, (plan, mine) in enumerate(zip(plans, rows, strict=True)):
        assert len(mine) == length // size and mine.equal(mine.sort().values)
        assert [at for run in plan.runs(length) for at in run] == mine.tolist()
        assert plans[0].rows(length, rank=rank).equal(mine)
    seen = [int((mine + 1).sum()) for mine in rows]  # keys that a rank's queries see
    assert len(set(seen)) == 1 or kind is ContextKind.ULYSSES
    x = torch.arange(2 * length).view(2, length)
    assert torch.cat([plan.own(x) for plan in plans], 1).sort(1).values.equal(x)


def test_one_rank_holds_the_row_itself() -> None:
    x = torch.arange(5).view(1, 5)
    assert ContextPlan(kind=ContextKind.RING).own(x) is x and ContextPlan().runs(5) == (range(5),)


def test_the_choice_and_refusals() -> None:
    choices = {(8, 8): ContextKind.ULYSSES, (8, 4): ContextKind.ULYSSES, (8, 2): ContextKind.RING, (6, 6): ContextKind.RING}
    for (heads, kv_heads), kind in choices.items():
        assert ContextPlan.choose(Group(0, 4), heads=heads, kv_heads=kv_heads).kind is kind
    assert ContextPlan.choose(Group.single(), heads=7, kv_heads=1).chunks == 1
    with pytest.raises(ConfigError, match="12 tokens cannot be cut into 8 equal chunks"):
        ContextPlan(Group(0, 4), ContextKind.RING).rows(12)
    assert len(ContextPlan(Group(0, 4), ContextKind.ULYSSES).rows(12)) == 3


def test_the_worked_example() -> None:
    assert doctest.testmod(context) == (0, 2)
