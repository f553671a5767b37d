# SPDX-License-Identifier: Apache-2.0
"""The end of the model: final norm, vocabulary or value head, and the handle that it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.model.chunked_cross_entropy import KL, TokenStats, Wanted, blockwise_nll, blockwise_stats
from megatron.model.layer_state import LayerState
from megatron.model.norms import ALONE, build_norm
from megatron.model.spec import HeadSpec, NormSpec
from megatron.mpu import comm
from megatron.mpu.groups import Group
from megatron.mpu.layers import ColumnLinear, RowLinear
from megatron.mpu.sharding import Initial, InitialValue


@dataclass(frozen=True, kw_only=True)
class Logits:
    """Logits on demand: final hidden states and the head's weight. Lives on the last stage and is never sent.

    hidden [b, s, h] replicated over tp, weight [v / tp, h]
    block_rows: how many rows of logits exist at once; 0 = chosen by device and vocabulary
    aux:        what the layers add to the loss, [] float32 (`LayerState.aux`). Whoever trains adds it to the objective's loss, times its
                share (1 / micro batches of the step over all replicas); evaluation leaves it out. None = nothing.
    """

    hidden: Tensor
    weight: Tensor
    tp: Group = field(default_factory=Group.single)
    block_rows: int = 0
    aux: Tensor | None = None

    def nll(self, labels: Tensor, weights: Tensor, denominator: Tensor | float) -> Tensor:
        """sum(weights * -log p(label)) / denominator, a float32 scalar.

        labels [b, s] int64 (any valid id where the weight is 0); weights [b, s] float, may be negative, get no gradient.
        The gradients of hidden and weight are formed block by block in this call, so backward may run once only.
        """
        return self.nll_and_logps(labels, weights, denominator)[0]

    def nll_and_logps(self, labels: Tensor, weights: Tensor, denominator: Tensor | float) -> tuple[Tensor, Tensor]:
        """`nll`, and from the same pass log p(label) [b, s] float32 without gradient, 0 where the weight is 0."""
        total, logps = blockwise_nll(self.hidden, self.weight, labels, weights, self.tp, self.block_rows)
        return total / denominator, logps

    def stats(
        self, wanted: Wanted, *, targets: Tensor | None = None, mask: Tensor | None = None, other: Logits | None = None
    ) -> TokenStats:
        """Several statistics of each position from one pass; differentiable, recomputes in backward.

        targets: [b, s] int64, where logp is wanted
        mask:    [b, s]; positions where it is 0 / False are not computed
        other:   the head that kl is measured from; frozen
        """
        if other is not None:
            wanted = replace(wanted, second=(other.hidden, other.weight))
        return blockwise_stats(self.hidden, self.weight, wanted, self.tp, targets=targets, mask=mask, block=self.block_rows)

    def token_logps(self, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """log p(target) [b, s] float32; 0 where mask [b, s] is 0 / False. Differentiable; recomputes in backward."""
        return _given(self.stats(Wanted(logp=True), targets=targets, mask=mask).logp)

    def logsumexp(self, mask: Tensor | None = None) -> Tensor:
        """log sum exp of each position's logits [b, s] float32 (z-loss), with gradient."""
        return _given(self.stats(Wanted(lse=True), mask=mask).lse)

    def entropy(self, mask: Tensor | None = None) -> Tensor:
        """-sum p log p [b, s] float32, with gradient."""
        return _given(self.stats(Wanted(entropy=True), mask=mask).entropy)

    def top1(self, mask: Tensor | None = None) -> Tensor:
        """The most likely id [b, s] int64; the lowest of several."""
        return _given(self.stats(Wanted(top1=True), mask=mask).top1)

    def kl(self, other: Logits, mask: Tensor | None = None, direction: KL = KL.FORWARD) -> Tensor:
        """Divergence from another, frozen head over the same vocabulary [b, s] float32, with gradient."""
        return _given(self.stats(Wanted(kl=direction), mask=mask, other=other).kl)

    def full(self) -> Tensor:
        """All logits [b, s, v], gathered over tp."""
        return comm.gather(F.linear(comm.copy(self.hidden, self.tp), self.weight), self.tp)


def _given(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


@dataclass(frozen=True, kw_only=True)
class Values:
    """What a value head gives: one score for each position, values [b, s] float32, replicated over tp; aux as in `Logits`."""

    values: Tensor
    aux: Tensor | None = None


Read = Callable[[Any], Any]
"""What is made of the head's handle (Logits or Values) while the head's forward runs."""


class FinalNorm(nn.Module):
    """The norm before the head. FORMAT: norm.weight, norm.bias | norm.scale | norm.g."""

    def __init__(self, spec: NormSpec, *, tp: Group = ALONE) -> None:
        super().__init__()
        self.norm = build_norm(spec, tp=tp)

    def forward(self, stream: LayerState) -> LayerState:
        """hidden [b, s, h] -> [b, s, h]."""
        return stream._replace(hidden=self.norm(stream.hidden))


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


class ValueHead(nn.Module):
    """One score per position in place of the vocabulary's logits (reward and value models).

    FORMAT: rm_linear.weight [1, h / tp], split along the input.
    """

    def __init__(self, spec: HeadSpec, *, tp: Group) -> None:
        super().__init__()
        self.spec = spec
        self.tp = tp
        # Its output has one feature and is whole on every rank, also where hidden states are spread along the sequence.
        self.rm_linear = RowLinear(spec.hidden_size, 1, tp=replace(tp, sequence=False), bias=False)

    def forward(self, stream: LayerState, read: Read | None = None) -> Any:
        """hidden [b, s, h] -> Values, or what `read` makes of them while this forward runs."""
        hidden = comm.gather_from_region(stream.hidden, self.tp)
        scores: Tensor = self.rm_linear(comm.scatter(hidden, self.tp))  # [b, s, 1]
        values = Values(values=scores[..., 0].float() * self.spec.multiplier, aux=stream.aux)
        return values if read is None else read(values)

    def tables(self) -> tuple[str, ...]:
        """Its one row is no feature of the model."""
        return ("rm_linear.weight",)

    def initial_values(self) -> Mapping[str, InitialValue]:
        """It is not a matrix of the residual stream."""
        return {"rm_linear.weight": Initial.INPUT}


def tied_logits(embedding: Any, stream: LayerState, spec: HeadSpec | None = None, read: Read | None = None) -> Any:
    """The head of a model whose embedding table is its head: `embedding.word_embeddings` is a VocabEmbedding."""
    table = embedding.word_embeddings
    return _finish(stream, table.weight, table.tp, spec, read)


def _finish(stream: LayerState, weight: Tensor, tp: Group, spec: HeadSpec | None, read: Read | None) -> Any:
    hidden = comm.gather_from_region(stream.hidden, tp)
    if spec is not None and spec.multiplier != 1.0:
        hidden = hidden * spec.multiplier
    logits = Logits(hidden=hidden, weight=weight, tp=tp, block_rows=0 if spec is None else spec.block_rows, aux=stream.aux)
    return logits if read is None else read(logits)
