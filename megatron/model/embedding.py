# SPDX-License-Identifier: Apache-2.0
"""Token embedding and the positions that are added to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatron.errors import NeoXError
from megatron.model.attention.inputs import document_positions
from megatron.model.layer_state import LayerState
from megatron.model.spec import EmbeddingSpec, Positions
from megatron.mpu.comm import scatter_to_region
from megatron.mpu.context import ContextPlan
from megatron.mpu.groups import Group
from megatron.mpu.layers import VocabEmbedding
from megatron.mpu.random import dropout

if TYPE_CHECKING:
    from megatron.model.layer_state import LayerCache


class Embedding(nn.Module):
    """Tokens [b, s] -> hidden [b, s, h], or this rank's [b, s / tp, h] where tp spreads the sequence.

    context: how whole rows are spread; then s tokens are this rank's part of them

    FORMAT: word_embeddings.weight [v / tp, h]; learned positions position_embeddings.weight [max_positions + offset, h].
    """

    def __init__(self, spec: EmbeddingSpec, *, tp: Group, context: ContextPlan | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.context = ContextPlan() if context is None else context
        self.tp = tp
        self.word_embeddings = VocabEmbedding(spec.vocab_size, spec.hidden_size, tp=tp)
        if spec.positions is Positions.LEARNED:
            self.position_embeddings = nn.Embedding(spec.max_positions + spec.position_offset, spec.hidden_size)

    def forward(
        self,
        stream: LayerState,
        cache: LayerCache | None = None,
        *,
        head: Callable[[Embedding, LayerState], Any] | None = None,
    ) -> Any:
        """stream (tokens [b, s] int64, segment_ids of whole rows, int32) -> LayerState(hidden [b, s, h], segment_ids).

        cache: of the first block; its lengths are how many tokens came before
        head:  a tied head to run on this module in place of the embedding. It runs inside this forward,
               where ZeRO-3 has the weight whole.
        """
        if head is not None:
            return head(self, stream)
        tokens, segment_ids = stream.hidden, stream.segment_ids
        spec = self.spec
        hidden: Tensor = self.word_embeddings(tokens)
        if spec.multiplier != 1.0:
            hidden = hidden * spec.multiplier
        if spec.positions in (Positions.LEARNED, Positions.SINUSOIDAL):
            if cache is None:
                positions, length = self.context.own(document_positions(segment_ids)), segment_ids.shape[1]
            else:
                positions, length = cache.positions(tokens.shape[1]), cache.longest + tokens.shape[1]
            added = self._positions(positions, length)
            hidden = hidden + scatter_to_region(added.to(hidden.dtype), self.tp) * spec.position_multiplier
        return LayerState(dropout(hidden, spec.dropout, self.tp, training=self.training), segment_ids)

    def tables(self) -> tuple[str, ...]:
        """Learned positions; the token embedding speaks for itself."""
        return ("position_embeddings.weight",) if self.spec.positions is Positions.LEARNED else ()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # FORMAT: the reference stores a sinusoidal table's frequencies; they are recomputed.
        state_dict.pop(f"{prefix}position_embeddings.inv_freq", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _positions(self, positions: Tensor, length: int) -> Tensor:
        """What is added at positions [b or 1, s] -> [b or 1, s, h]; length: the last position + 1."""
        if self.spec.positions is Positions.SINUSOIDAL:
            return sinusoid(positions, self.spec.hidden_size)
        if length > self.spec.max_positions:
            raise NeoXError(
                f"{length} tokens do not fit {self.spec.max_positions} learned positions",
                where="max_position_embeddings",
                fix="shorten the input, or train with more positions",
            )
        out: Tensor = self.position_embeddings(positions + self.spec.position_offset)
        return out


def sinusoid(positions: Tensor, size: int) -> Tensor:
    """Sines of size / 2 frequencies, then their cosines (Vaswani et al., arXiv 1706.03762, sec. 3.5); [b, s] -> [b, s, size] fp32."""
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size))
    angles = positions.to(torch.float32)[..., None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
