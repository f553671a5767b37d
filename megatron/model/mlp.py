# SPDX-License-Identifier: Apache-2.0
"""The feed-forward sublayer, dense or gated. Knows nothing of norms and residuals."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.model.activations import activation_of
from megatron.model.spec import MLPSpec
from megatron.mpu.groups import Group
from megatron.mpu.layers import ColumnLinear, RowLinear


class MLP(nn.Module):
    """h -> width -> h.

    FORMAT: a gated linear1 holds rows [value; gate] (each `width` rows), out = value * act(gate).
    """

    def __init__(self, spec: MLPSpec, *, tp: Group, defer_reduce: bool = False) -> None:
        super().__init__()
        self.gated = spec.gated
        self.activation = activation_of(spec.activation)
        rows = (spec.width, spec.width) if spec.gated else None
        self.linear1 = ColumnLinear(spec.hidden_size, sum(rows) if rows else spec.width, tp=tp, bias=spec.bias, parts=rows)
        self.linear2 = RowLinear(spec.width, spec.hidden_size, tp=tp, bias=spec.bias, defer_reduce=defer_reduce)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [b, s, h] -> [b, s, h]; with defer_reduce this rank's share of the sum over tp."""
        inner = self.linear1(hidden)  # [b, s, width / tp], twice that when gated
        if self.gated:
            value, gate = inner.chunk(2, dim=-1)
            inner = value * self.activation(gate)
        else:
            inner = self.activation(inner)
        out: Tensor = self.linear2(inner)
        return out
