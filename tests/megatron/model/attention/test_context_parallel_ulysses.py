# SPDX-License-Identifier: Apache-2.0
"""Ulysses attention on two and four ranks is the attention of one process, in outputs and gradients, with every back end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.errors import BackendError
from megatron.model.attention import context_parallel
from megatron.model.attention.backends import sdpa
from megatron.model.attention.inputs import AttentionInputs
from megatron.model.spec import AttentionSpec, BackendName, NormKind, NormSpec, RotarySpec, RpeSpec
from megatron.mpu import comm
from megatron.mpu.context import ContextKind, ContextPlan
from megatron.mpu.groups import Group, Topology
from support.context import WHOLE, Case, S, all_results, errors, put_together
from support.dist import run_distributed

MHA = AttentionSpec(hidden_size=32, num_heads=8, num_kv_heads=8, head_dim=4, rotary=RotarySpec(dim=4))
GQA = replace(MHA, num_kv_heads=4)
NORM = NormSpec(kind=NormKind.RMSNORM, size=32, eps=1e-6)
PACKED = ((5, 9, 4, 6), (12, 12), (24,), (3, 1, 2, 2, 16))  # cuts are at 12, or at 6, 12, 18
CASES = {
    "mha": Case(MHA),
    "gqa, documents": Case(GQA, PACKED),
    "gqa, window, documents": Case(replace(GQA, window=3, qk_norm=NORM, separate_qk_norms=True), PACKED),
    "eager, documents": Case(replace(GQA, backend=BackendName.EAGER), PACKED),
    "alibi, documents": Case(replace(GQA, rotary=None, alibi=True), PACKED),
    "rpe": Case(replace(GQA, rotary=None, rpe=RpeSpec(num_buckets=8, max_distance=20))),
    "joined documents": Case(replace(MHA, isolated=False), PACKED),
    "bf16": Case(GQA, PACKED, torch.bfloat16),
}
SPAN = range(5, 14)  # the second document of row 0
ALONE = {
    f"{name} {noise:g}": Case(replace(spec, backend=backend), PACKED, dtype, SPAN, noise)
    for name, spec, backend, dtype in (
        ("gqa", GQA, BackendName.SDPA, torch.float32),
        ("eager, window", replace(MHA, window=4), BackendName.EAGER, torch.float32),
        ("bf16", MHA, BackendName.SDPA, torch.bfloat16),
    )
    for noise in (0.0, 100.0)
}


def dropped(plan: ContextPlan) -> Tensor:
    """Equal heads under dropout; [s / cp, n, d]."""
    torch.manual_seed(4)
    q, k, v = torch.randn(3, 1, 8 // plan.size, 1, 4).expand(-1, -1, -1, 4, -1).unbind(0)
    return context_parallel.ulysses_attention(
        q, k, v, AttentionInputs(scale=0.5, dropout=0.5, seeds=(1, 2, 3, 4)[: q.shape[2]]), plan, sdpa
    )[0]


def on_ranks(rank: int, world: int) -> dict[str, Any]:
    plan = ContextPlan(comm.open_groups(Topology(tensor=world), rank).tp, ContextKind.ULYSSES)
    with pytest.raises(BackendError, match="init_distributed has not been called"):
        dropped(plan)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as in engine/distributed.py: nothing is compiled
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    out: dict[str, Any] = {"layers": all_results(CASES | ALONE, plan), "dropped": dropped(plan)}
    out["common"] = torch.rand(3)
    return out


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world: int) -> None:
    ranks = run_distributed(on_ranks, world)
    plans = [ContextPlan(Group(rank, world), ContextKind.ULYSSES) for rank in range(world)]
    one = all_results({**CASES, "bf16": replace(CASES["bf16"], dtype=torch.float32)}, WHOLE)
    for name, expected in one.items():
        found = errors(put_together([rank["layers"][name] for rank in ranks], plans), expected)
        limits = (2e-2, 3e-2) if name == "bf16" else (1e-6, 1e-5)
        assert found.pop("out") < limits[0], name
        assert max(found.values()) < limits[1], f"{name}: {found}"
    check_isolation([rank["layers"] for rank in ranks], plans)
    for rank in ranks:
        first, other = rank["dropped"][:, 0], rank["dropped"][:, 4 // world]  # the first head of the first two ranks
        assert not first.equal(other), "ranks drop the same weights"
        assert rank["common"].equal(ranks[0]["common"]), "outside attention random numbers have parted"


def check_isolation(ranks: list[dict[str, dict[str, Tensor]]], plans: list[ContextPlan]) -> None:
    """A document's outputs and all gradients are the same bits whatever its neighbours and the other rows are."""
    for name in {case.rpartition(" ")[0] for case in ALONE}:
        calm, noisy = (put_together([rank[f"{name} {noise}"] for rank in ranks], plans) for noise in (0, 100))
        inside = slice(SPAN.start, SPAN.stop)
        assert calm["out"][0, inside].equal(noisy["out"][0, inside]) and not calm["out"].equal(noisy["out"])
        for what in set(calm) - {"out"}:
            assert calm[what].equal(noisy[what]), f"{name}: {what} knows its neighbours"
        outside = calm["x"].clone()
        outside[0, inside] = 0.0
        assert (outside == 0).all() and calm["x"][0, inside].abs().min() > 0


def test_a_rank_has_its_own_slopes() -> None:
    slopes = torch.arange(8.0)
    view = AttentionInputs(scale=1.0, slopes=slopes, bias=lambda s, t: slopes[:, None, None].expand(8, s, t))
    mine = context_parallel.own_heads(view, 8, Group(1, 4))
    assert mine.slopes is not None and mine.bias is not None
    assert mine.slopes.tolist() == [2, 3] and mine.bias(2, 3).tolist() == [[[2.0] * 3] * 2, [[3.0] * 3] * 2]
    plain = context_parallel.own_heads(AttentionInputs(scale=1.0), 8, Group(1, 4))
    assert plain.bias is None and plain.slopes is None


def test_nothing_changes_without_context_parallelism() -> None:
    """A plan of one rank is the layer without one."""
    assert ContextPlan(kind=ContextKind.RING).own(torch.ones(1, S)).shape == (1, S)
    for case in CASES.values():
        for kind in ContextKind:
            alone, plain = (all_results({"": case}, plan)[""] for plan in (ContextPlan(kind=kind), WHOLE))
            assert all(alone[what].equal(plain[what]) for what in plain)
