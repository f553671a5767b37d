# SPDX-License-Identifier: Apache-2.0
"""The checksum sees every single change and exchange of entries; what it tells is the same on all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megatron.hooks import replica_consistency
from megatron.hooks.replica_consistency import digest, drifted
from megatron.mpu.groups import Group, Groups
from megatron.mpu.sharding import Sharding, Split
from support.dist import run_distributed

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CPU = torch.device("cpu")


def bits_of(x: Tensor) -> Tensor:
    return x.view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_flipped_bit_is_seen(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0, 1] = 0.0
    before = int(digest(x))
    seen = set()
    for entry in range(x.numel()):
        for bit in range(8 * x.element_size()):
            changed = x.clone()
            octets = changed.view(-1).view(torch.uint8)
            octets[entry * x.element_size() + bit // 8] ^= 1 << bit % 8
            assert not torch.equal(bits_of(changed), bits_of(x))
            seen.add(int(digest(changed)))
    assert before not in seen and int(digest(x)) == before


def test_every_exchange_is_seen_and_equal_bits_have_one_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, generator=torch.Generator().manual_seed(2))
    x[6] = -x[0]
    before = int(digest(x))
    for first in range(7):
        for second in range(first):
            order = torch.arange(7)
            order[first], order[second] = second, first
            assert int(digest(x[order])) != before
    # Neither the chunks nor the form of a tensor in memory matter.
    factors = 2 * np.arange(7, dtype=np.uint64) + 1
    truth = (x.numpy().view(np.int32).astype(np.int64).view(np.uint64) * factors).sum(dtype=np.uint64).astype(np.int64)
    for chunk in (1, 2, 3, 7, 100):
        monkeypatch.setattr(replica_consistency, "CHUNK_ON_CPU", chunk)
        assert int(digest(x)) == before == int(truth)
    square = torch.arange(6.0).reshape(2, 3)
    assert int(digest(square.t())) == int(digest(square.t().contiguous())) != int(digest(square))
    assert int(digest(torch.zeros(0))) == 0 == int(digest(torch.zeros(())))


def test_a_process_alone_has_nothing_to_compare() -> None:
    assert drifted(nn.Linear(2, 2), Groups.single(), CPU) == []


class Half(nn.Module):
    """A split weight, and one that each tensor rank has."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Parameter(torch.ones(5))
        self.same = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))

    def sharding(self) -> dict[str, Sharding]:
        return {"cut": Split(0)}


def found(rank: int, world: int) -> list[Any]:
    """What each axis sees of changes on rank 1 of three."""
    import torch.distributed as dist

    everyone = Group(rank=rank, size=world, ranks=tuple(range(world)), handle=dist.group.WORLD)
    replicated, tensor, pipe = (Groups(**{axis: everyone, "world": everyone}) for axis in ("replicas", "tp", "pp"))

    def look(groups: Groups, *changed: str, stage: bool = False) -> list[str]:
        module = nn.ModuleDict({"tied_modules" if stage else "layer": nn.ModuleDict({"embed": Half()})})
        if stage and rank == 2:  # a stage without the tied module
            module = nn.ModuleDict({"other": Half()})
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if rank == 1 and name.split(".")[-1] in changed:
                    bits_of(parameter)[1] ^= 1
        return drifted(module, groups, CPU)

    return [
        look(replicated),
        look(replicated, "cut"),
        look(replicated, "cut", "same"),
        look(tensor, "cut"),
        look(tensor, "same"),
        look(pipe, "cut", "same"),
        look(pipe, stage=True),
        look(pipe, "same", stage=True),
    ]


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_the_odd_rank_is_named_where_ranks_share_weights() -> None:
    answers = run_distributed(found, world=3, timeout_s=100)
    assert answers[0] == answers[1] == answers[2]
    cut, same = ("layer.embed.cut: rank 1 holds another than ranks 0, 2", "layer.embed.same: rank 1 holds another than ranks 0, 2")
    tied = "tied_modules.embed.same: ranks 0, 1 hold different ones"
    assert answers[0] == [[], [cut], [cut, same], [], [same], [], [], [tied]]
