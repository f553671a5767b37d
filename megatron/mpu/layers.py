# SPDX-License-Identifier: Apache-2.0
"""Linear and embedding layers that are split over a tensor parallel group and say so. Size 1 is the ordinary case.

Weights are [n_out, n_in] like nn.Linear's. Fresh ones are normal(0, 0.02), biases 0: a model's initialiser overwrites them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.mpu import comm
from megatron.mpu.groups import Group
from megatron.mpu.sharding import Initial, InitialValue, Replicated, Sharding, Split, Summed, local_size

LinearOp = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x [..., k], weight [m, k], bias [m] or None) -> [..., m], all as this rank holds them. It must be linear in x."""


class SplitLinear(nn.Module):
    """What column and row layers share: a weight, a bias, and the one operation that multiplies by them.

    linear: replaced by `attach_linear`; an nn.Module with parameters of its own (LoRA) becomes a submodule
    """

    linear: LinearOp

    def __init__(self, shape: tuple[int, int], *, tp: Group, bias: bool) -> None:
        super().__init__()
        self.tp = tp
        self.linear = F.linear
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None
        nn.init.normal_(self.weight, std=0.02)


def attach_linear(module: nn.Module, choose: Callable[[str, SplitLinear], LinearOp | None]) -> list[str]:
    """Give column and row layers of a module tree another operation: LoRA, FP8, quantised weights.

    choose: (name, layer) -> the operation of that layer; None = leave it
    Returns the names of the layers that were changed. The embedding and the head use their weights without one.
    """
    changed = []
    for name, layer in list(module.named_modules()):
        if isinstance(layer, SplitLinear) and (operation := choose(name, layer)) is not None:
            layer.linear = operation
            changed.append(name)
    return changed


class ColumnLinear(SplitLinear):
    """y = x W^T + b with the outputs spread over tp: W [n_out / tp, n_in], b [n_out / tp] (arXiv 1909.08053, sec. 3).

    parts: global output sizes that are cut each by itself (fused q|k|v, value|gate); they sum to n_out
    Raises ConfigError when an output part cannot be divided over tp.
    """

    def __init__(self, n_in: int, n_out: int, *, tp: Group, bias: bool = True, parts: tuple[int, ...] | None = None) -> None:
        rows = sum(local_size(part, tp.size, "an output of") for part in parts or (n_out,))
        super().__init__((rows, n_in), tp=tp, bias=bias)
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n_in] replicated, or [b, s / tp, n_in] where the sequence is spread -> [..., n_out / tp] of the whole sequence."""
        return self.linear(comm.copy_to_region(x, self.tp), self.weight, self.bias)

    def sharding(self) -> dict[str, Sharding]:
        """Rows, part by part."""
        how = Split(0, self.parts)
        return {"weight": how} if self.bias is None else {"weight": how, "bias": how}


class RowLinear(SplitLinear):
    """y = x W^T + b with the inputs spread over tp: W [n_out, n_in / tp], b [n_out].

    defer_reduce: give this rank's share of the sum; the caller reduces (once, for several layers)
    Raises ConfigError when n_in cannot be divided over tp.
    """

    def __init__(self, n_in: int, n_out: int, *, tp: Group, bias: bool = True, defer_reduce: bool = False) -> None:
        super().__init__((n_out, local_size(n_in, tp.size, "an input of")), tp=tp, bias=bias)
        self.defer_reduce = defer_reduce

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n_in / tp] -> [..., n_out], or [b, s / tp, n_out] where the sequence is spread; with defer_reduce a partial sum."""
        if self.defer_reduce or self.tp.size == 1:
            # FORMAT: with a deferred reduce every rank adds its bias before the sum, so a checkpoint holds bias / tp.
            return self.linear(x, self.weight, self.bias)
        y = comm.reduce_from_region(self.linear(x, self.weight, None), self.tp)
        return y if self.bias is None else y + comm.sum_weight_grad(self.bias, self.tp)

    def sharding(self) -> dict[str, Sharding]:
        """Columns; the bias is whole, or with defer_reduce a share."""
        table: dict[str, Sharding] = {"weight": Split(1)}
        if self.bias is not None:
            table["bias"] = Summed() if self.defer_reduce else Replicated()
        return table

    def initial_values(self) -> Mapping[str, InitialValue]:
        """It writes into the residual stream."""
        return {"weight": Initial.OUTPUT}


class VocabEmbedding(nn.Module):
    """Embedding table with the vocabulary spread over tp: W [v / tp, h]."""

    def __init__(self, vocab_size: int, hidden_size: int, *, tp: Group) -> None:
        super().__init__()
        self.tp = tp
        rows = local_size(vocab_size, tp.size, "padded vocabulary")
        self.first = tp.rank * rows
        self.weight = nn.Parameter(torch.empty(rows, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [b, s] int64 -> [b, s, h] replicated, or [b, s / tp, h] where the sequence is spread."""
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.first
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return comm.reduce_from_region(found.masked_fill(elsewhere[..., None], 0.0), self.tp)

    def sharding(self) -> dict[str, Sharding]:
        """Rows."""
        return {"weight": Split(0)}

    def tables(self) -> tuple[str, ...]:
        """The embedding: one side is the vocabulary."""
        return ("weight",)
