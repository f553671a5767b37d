# SPDX-License-Identifier: Apache-2.0
"""What the previous rank of a group sent arrives, in groups of every shape and with several steps under way."""

from __future__ import annotations

import torch

from megatron.mpu import comm
from megatron.mpu.comm import shift
from megatron.mpu.groups import Group, Topology
from support.dist import run_distributed


def on_four_ranks(rank: int, world: int) -> dict[str, list[int]]:
    apart = comm.open_groups(Topology(data=2, tensor=2), rank).dp  # (0, 2) and (1, 3)
    every = comm.open_groups(Topology(tensor=4), rank).tp
    big = torch.full((1 << 18,), rank, dtype=torch.bfloat16)
    exact = torch.full((3, 1 << 16), float(rank))
    first, second, third = shift(big, every), shift(exact.T, every), shift(big + 10, apart)
    arrived = [third.wait(), second.wait(), first.wait()]
    around = exact
    for _ in range(4):
        around = shift(around, every).wait()
    assert around.equal(exact) and arrived[1].shape == (1 << 16, 3)
    return {"from": [int(x.unique().item()) for x in arrived]}


def test_four_ranks_and_pairs() -> None:
    for rank, found in enumerate(run_distributed(on_four_ranks, 4)):
        assert found["from"] == [(rank + 2) % 4 + 10, (rank - 1) % 4, (rank - 1) % 4]


def test_alone_a_tensor_stays() -> None:
    x = torch.ones(2)
    assert shift(x, Group.single()).wait() is x
