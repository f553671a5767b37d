# SPDX-License-Identifier: Apache-2.0
"""Ring attention on two and three ranks is the attention of one process, in outputs and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.errors import ConfigError
from megatron.model.attention import context_parallel
from megatron.model.attention.backends import eager
from megatron.model.attention.inputs import AttentionInputs, PackedSequences
from megatron.model.attention.layer import SelfAttention
from megatron.model.spec import AttentionSpec, BackendName, NormKind, NormSpec, RotarySpec, RpeSpec
from megatron.mpu import comm
from megatron.mpu.context import ContextKind, ContextPlan
from megatron.mpu.groups import Group, Topology
from support.context import WHOLE, Case, S, all_results, error, errors, put_together, segment_ids
from support.dist import run_distributed

MHA = AttentionSpec(hidden_size=32, num_heads=4, num_kv_heads=4, head_dim=8, rotary=RotarySpec(dim=8))
GQA = replace(MHA, num_kv_heads=2, rotary=RotarySpec(dim=4))
MQA = replace(MHA, num_kv_heads=1, softmax_scale=0.7, logit_divisor=3.0)
NORM = NormSpec(kind=NormKind.RMSNORM, size=32, eps=1e-6)
# Cuts of two ranks are at 6, 12, 18; of three at 4, 8, ..., 20.
PACKED = ((5, 9, 4, 6), (12, 12), (24,), (3, 1, 2, 2, 16))
CASES = {
    "mha": Case(MHA),
    "gqa": Case(GQA),
    "mqa": Case(MQA),
    "gqa, window": Case(replace(GQA, window=5, qk_norm=NORM, separate_qk_norms=True)),
    "mha, documents": Case(MHA, PACKED),
    "gqa, documents": Case(GQA, PACKED),
    "mqa, window, documents": Case(replace(MQA, window=3), PACKED),
    "joined documents": Case(replace(GQA, isolated=False), PACKED),
    "bf16": Case(GQA, PACKED, torch.bfloat16),
}
SPAN = range(5, 14)  # the second document of row 0
ALONE = {
    f"{name} {noise:g}": Case(replace(spec, window=window), PACKED, dtype, SPAN, noise)
    for name, spec, window, dtype in (
        ("gqa", GQA, None, torch.float32),
        ("mqa, window", MQA, 4, torch.float32),
        ("mha, bf16", MHA, None, torch.bfloat16),
    )
    for noise in (0.0, 100.0)
}


def exact(plan: ContextPlan, heads: int, window: int | None, case: Case, kind: str) -> list[Tensor]:
    """Attention alone in float64: output and gradients of own rows, by the ring or by the reference."""
    draw = torch.Generator().manual_seed(3)
    shapes = ((case.rows, S, 4, 8), (case.rows, S, heads, 8), (case.rows, S, heads, 8), (case.rows, S, 4, 8))
    *qkv, weights = (plan.own(torch.randn(shape, generator=draw, dtype=torch.float64)) for shape in shapes)
    marks = segment_ids(case)
    view = AttentionInputs(documents=None if marks is None else PackedSequences.of(marks), window=window, scale=0.4, fp32=False)
    for x in qkv:
        x.requires_grad_()
    out = context_parallel.ring_attention(*qkv, view, plan) if kind == "ring" else eager(*qkv, view)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), qkv)]


EXACT = [(heads, window, Case(MHA, documents)) for heads in (4, 2, 1) for window in (None, 1, 7) for documents in (None, PACKED)]


def on_ranks(rank: int, world: int) -> dict[str, Any]:
    plan = ContextPlan(comm.open_groups(Topology(tensor=world), rank).tp, ContextKind.RING)
    out: dict[str, Any] = {"plan": plan.rows(S), "layers": all_results(CASES | ALONE, plan)}
    whole = [exact(plan, *what, "ring") for what in EXACT]
    context_parallel.QUERIES, before = 2, context_parallel.QUERIES  # many small pieces
    out["exact"], out["small pieces"] = whole, [exact(plan, *what, "ring") for what in EXACT]
    context_parallel.QUERIES = before
    return out


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one_process(world: int) -> None:
    ranks = run_distributed(on_ranks, world)
    plans = [ContextPlan(Group(rank, world), ContextKind.RING) for rank in range(world)]
    for at, what in enumerate(EXACT):
        expected = exact(WHOLE, *what, "eager")
        order = torch.cat([plan.rows(S) for plan in plans]).argsort()
        for pieces in ("exact", "small pieces"):
            for number, value in enumerate(expected):
                found = torch.cat([rank[pieces][at][number] for rank in ranks], dim=1)[:, order]
                assert error(found, value) < 1e-13, f"{pieces} {what} {number}"
    one = all_results({**CASES, "bf16": replace(CASES["bf16"], dtype=torch.float32)}, WHOLE)
    for name, expected in one.items():
        found = errors(put_together([rank["layers"][name] for rank in ranks], plans), expected)
        limits = (2e-2, 3e-2) if name == "bf16" else (1e-6, 1e-5)
        assert found.pop("out") < limits[0], name
        assert max(found.values()) < limits[1], f"{name}: {found}"
    check_isolation([rank["layers"] for rank in ranks], plans)


def check_isolation(ranks: list[dict[str, dict[str, Tensor]]], plans: list[ContextPlan]) -> None:
    """A document's outputs and all gradients are the same bits whatever its neighbours and the other rows are."""
    for name in {case.rpartition(" ")[0] for case in ALONE}:
        calm, noisy = (put_together([rank[f"{name} {noise}"] for rank in ranks], plans) for noise in (0, 100))
        inside = slice(SPAN.start, SPAN.stop)
        assert calm["out"][0, inside].equal(noisy["out"][0, inside]) and not calm["out"].equal(noisy["out"])
        for grad in (calm["x"], noisy["x"]):
            assert grad[0, inside].abs().min() > 0
            outside = grad.clone()
            outside[0, inside] = 0.0
            assert (outside == 0).all(), f"{name}: a neighbour has a gradient"
        for what in set(calm) - {"out"}:
            assert calm[what].equal(noisy[what]), f"{name}: {what} knows its neighbours"


def test_refusals() -> None:
    plan = ContextPlan(Group(0, 2), ContextKind.RING)
    for spec, reason in (
        (replace(MHA, alibi=True), "no bias"),
        (replace(MHA, rpe=RpeSpec()), "no bias"),
        (replace(MHA, dropout=0.1), "no attention dropout"),
        (replace(MHA, backend=BackendName.SDPA), "attention_backend sdpa"),
    ):
        assert context_parallel.ring_refuses(MHA) is None
        with pytest.raises(ConfigError, match=reason):
            SelfAttention(spec, tp=Group.single(), context=plan)
        SelfAttention(spec, tp=Group.single(), context=ContextPlan(kind=ContextKind.RING))
    layer = SelfAttention(MHA, tp=Group.single(), context=plan)
    cache = layer.allocate_cache(1, 4, torch.float32, "cpu")
    with pytest.raises(ConfigError, match="whole rows"):
        layer(torch.zeros(1, 1, 32), None, cache)
