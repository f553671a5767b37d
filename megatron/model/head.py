# SPDX-License-Identifier: Apache-2.0
"""The end of the model: final norm, vocabulary head, and the handle it returns in place of logits. Knows no objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.model.chunked_cross_entropy import blockwise_nll, blockwise_token_logps
from megatron.model.layer_state import LayerState
from megatron.model.norms import ALONE, build_norm
from megatron.model.spec import HeadSpec, NormSpec
from megatron.mpu import comm
from megatron.mpu.groups import Group
from megatron.mpu.layers import ColumnLinear


@dataclass(frozen=True, kw_only=True)
class Logits:
    """Logits on demand: final hidden states and the head's weight. Lives on the last stage and is never sent.

    hidden [b, s, h] replicated over tp, weight [v / tp, h]
    block_rows: how many rows of logits exist at once; 0 = chosen by device and vocabulary
    """

    hidden: Tensor
    weight: Tensor
    tp: Group = field(default_factory=Group.single)
    block_rows: int = 0

    def nll(self, labels: Tensor, weights: Tensor, denominator: Tensor | float) -> Tensor:
        """sum(weights * -log p(label)) / denominator, a float32 scalar.

        labels [b, s] int64 (any valid id where the weight is 0); weights [b, s] float, may be negative, get no gradient.
        The gradients of hidden and weight are formed block by block in this call, so backward may run once only.
        """
        total = blockwise_nll(self.hidden, self.weight, labels, weights, self.tp, self.block_rows)
        return total / denominator

    def token_logps(self, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """log p(target) [b, s] float32; 0 where mask [b, s] is 0 / False. Differentiable; recomputes in backward."""
        return blockwise_token_logps(self.hidden, self.weight, targets, mask, self.tp, self.block_rows)

    def full(self) -> Tensor:
        """All logits [b, s, v], gathered over tp."""
        return comm.gather(F.linear(comm.copy(self.hidden, self.tp), self.weight), self.tp)


Read = Callable[[Logits], Any]


class FinalNorm(nn.Module):
    """The norm before the head. FORMAT: norm.weight, norm.bias | norm.scale | norm.g."""

    def __init__(self, spec: NormSpec, *, tp: Group = ALONE) -> None:
        super().__init__()
        self.norm = build_norm(spec, tp=tp)

    def forward(self, stream: LayerState) -> LayerState:
        """hidden [b, s, h] -> [b, s, h]."""
        hidden, segment_ids = stream
        return LayerState(self.norm(hidden), segment_ids)


class LMHead(nn.Module):
    """An untied vocabulary head. FORMAT: final_linear.weight [v / tp, h]."""

    def __init__(self, spec: HeadSpec, *, tp: Group) -> None:
        super().__init__()
        self.spec = spec
        self.final_linear = ColumnLinear(spec.hidden_size, spec.vocab_size, tp=tp, bias=False)

    def forward(self, stream: LayerState, read: Read | None = None) -> Any:
        """hidden [b, s, h] -> Logits, or what `read` makes of them while this forward runs (ZeRO-3 has the weight whole only then)."""
        return _finish(stream, self.final_linear.weight, self.final_linear.tp, self.spec, read)

    def tables(self) -> tuple[str, ...]:
        """The head: one side is the vocabulary."""
        return ("final_linear.weight",)


def tied_logits(embedding: Any, stream: LayerState, spec: HeadSpec | None = None, read: Read | None = None) -> Any:
    """The head of a model whose embedding table is its head: `embedding.word_embeddings` is a VocabEmbedding."""
    table = embedding.word_embeddings
    return _finish(stream, table.weight, table.tp, spec, read)


def _finish(stream: LayerState, weight: Tensor, tp: Group, spec: HeadSpec | None, read: Read | None) -> Any:
    hidden = comm.gather_from_region(stream[0], tp)
    if spec is not None and spec.multiplier != 1.0:
        hidden = hidden * spec.multiplier
    logits = Logits(hidden=hidden, weight=weight, tp=tp, block_rows=0 if spec is None else spec.block_rows)
    return logits if read is None else read(logits)
