# SPDX-License-Identifier: Apache-2.0
"""The dense feed-forward, plain or gated, and its activation functions by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.errors import ConfigError
from megatron.model.layer_state import FeedForward
from megatron.model.spec import MLPSpec
from megatron.mpu.groups import Group
from megatron.mpu.layers import ColumnLinear, RowLinear

Activation = Callable[[Tensor], Tensor]


PLAIN: Mapping[str, Activation] = MappingProxyType(
    {
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),  # Hendrycks and Gimpel, arXiv 1606.08415, sec. 2
        "relu": F.relu,
        "softsign": F.softsign,
        "swish": F.silu,
        "silu": F.silu,
        "mish": F.mish,  # arXiv 1908.08681
    }
)

# Gated linear units (Shazeer, arXiv 2002.05202): the function applied to the gate.
GATES: Mapping[str, Activation] = MappingProxyType(
    {
        "geglu": F.gelu,
        "reglu": F.relu,
        "swiglu": F.silu,
        "bilinear": nn.Identity(),
        "glu": torch.sigmoid,
    }
)


def activation_of(name: str) -> Activation:
    """The function that `name` applies: to the whole projection, or, for a gated name, to the gate half.

    Raises ConfigError for an unknown name.
    """
    found = PLAIN.get(name) or GATES.get(name)
    if found is None:
        raise ConfigError(f"unknown activation '{name}'", where="activation", fix=f"one of {', '.join((*PLAIN, *GATES))}")
    return found


class MLP(FeedForward):
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

    @staticmethod
    def matrix_elements(spec: MLPSpec) -> int:
        """Elements of linear1 and linear2."""
        return spec.hidden_size * spec.width * (3 if spec.gated else 2)

    @staticmethod
    def parameter_count(spec: MLPSpec) -> int:
        """Both projections."""
        rows = 2 * spec.width if spec.gated else spec.width
        return MLP.matrix_elements(spec) + (rows + spec.hidden_size if spec.bias else 0)

    @staticmethod
    def forward_flops(spec: MLPSpec, length: int) -> float:
        """Both products, whatever the row's length."""
        return 2.0 * MLP.matrix_elements(spec)
