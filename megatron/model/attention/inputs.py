# SPDX-License-Identifier: Apache-2.0
"""What a back end is told beside queries, keys and values. Knows no back end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron.model.attention.masks import PackedSequences

BiasOf = Callable[[int, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """What queries see and how scores are made.

    documents: packed documents; None = each row is one
    window:    tokens visible behind the current one; None = all
    scale:     factor on q k
    divisor:   scores are held divided by this and multiplied back inside the softmax (numerics of 16-bit scores only)
    bias:      (s, t) -> [n, s, t] added to the scores, a function of the distance alone; None = nothing
    slopes:    [n] float32 where that bias is ALiBi, for kernels that make it themselves
    dropout:   probability of dropping an attention weight
    seeds:     with dropout, one per head of this rank
    fp32:      softmax in float32 whatever the dtype (EAGER; fused kernels always do)
    """

    documents: PackedSequences | None = None
    window: int | None = None
    scale: float
    divisor: float = 1.0
    bias: BiasOf | None = None
    slopes: Tensor | None = None
    dropout: float = 0.0
    seeds: tuple[int, ...] = ()
    fp32: bool = True
