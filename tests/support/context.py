# SPDX-License-Identifier: Apache-2.0
"""Self-attention on ranks that share sequences, against one process: the same layer, rows and loss on both sides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron.model.attention.layer import SelfAttention
from megatron.model.spec import AttentionSpec
from megatron.mpu.context import ContextPlan
from megatron.mpu.groups import Group

S = 24
WHOLE = ContextPlan()


@dataclass(frozen=True)
class Case:
    """A layer, its precision, and documents by their lengths in each row (None = one document a row)."""

    spec: AttentionSpec
    documents: tuple[tuple[int, ...], ...] | None = None
    dtype: torch.dtype = torch.float32
    loss_of: range = field(default=range(S))  # positions of row 0 that the loss is of; of other rows all when all of row 0
    noise_outside: float = 0.0  # added to every input that the loss is not of

    @property
    def rows(self) -> int:
        return 2 if self.documents is None else len(self.documents)


def segment_ids(case: Case) -> Tensor | None:
    """[b, s] int32; the third document of a row has the first one's number again."""
    if case.documents is None:
        return None
    return torch.tensor([[at % 2 for at, n in enumerate(row) for _ in range(n)] for row in case.documents], dtype=torch.int32)


def results(case: Case, plan: ContextPlan) -> dict[str, Tensor]:
    """Output and gradients of own rows, and this rank's share of the parameters' gradients."""
    layer = SelfAttention(case.spec, tp=Group.single(), context=plan)
    draw = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=draw) * 0.4).to(torch.bfloat16).to(case.dtype)
    x, weights = torch.randn(2, case.rows, S, case.spec.hidden_size, generator=draw).to(torch.bfloat16).to(case.dtype)
    wanted = torch.zeros(case.rows, S, 1, dtype=case.dtype)
    wanted[0, case.loss_of.start : case.loss_of.stop] = 1.0
    if len(case.loss_of) == S:
        wanted[:] = 1.0
    x = plan.own(x + (1.0 - wanted) * case.noise_outside).requires_grad_()
    out = layer(x, segment_ids(case))
    (out * plan.own(weights * wanted)).sum().backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **grads}


def put_together(ranks: list[dict[str, Tensor]], plans: list[ContextPlan]) -> dict[str, Tensor]:
    """What one process would have: rows in their places, parameters' gradients summed."""
    order = torch.cat([plan.rows(S) for plan in plans]).argsort()
    whole = {name: torch.cat([rank[name] for rank in ranks], dim=1)[:, order] for name in ("out", "x")}
    return whole | {name: torch.stack([rank[name] for rank in ranks]).sum(0) for name in ranks[0] if name not in whole}


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected value."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """`error` of every tensor."""
    assert found.keys() == expected.keys()
    return {name: error(found[name], expected[name]) for name in expected}


def all_results(cases: dict[str, Case], plan: ContextPlan) -> dict[str, Any]:
    """`results` of every case."""
    return {name: results(case, plan) for name, case in cases.items()}
