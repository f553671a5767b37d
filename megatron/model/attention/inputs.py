# SPDX-License-Identifier: Apache-2.0
"""The inputs of an attention back end beside queries, keys and values: packed documents, and what each token may see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.model.positions import distances

BiasOf = Callable[[int, int], Tensor]

ROOM = 16
"""Documents per row that fixed-shape tensors have room for; a batch with more gets the next power of two."""


def document_positions(segment_ids: Tensor) -> Tensor:
    """Position of every token within its document; segment_ids [b, s] -> [b, s] int64.

    >>> document_positions(torch.tensor([[0, 0, 1, 1, 1]]))
    tensor([[0, 1, 0, 1, 2]])
    """
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    start = torch.where(_opens(segment_ids), index, 0).cummax(dim=1).values
    return index - start


def _opens(segment_ids: Tensor) -> Tensor:
    """Whether a token is the first of its document; [b, s] bool."""
    first = torch.ones_like(segment_ids[:, :1], dtype=torch.bool)
    return torch.cat((first, segment_ids[:, 1:] != segment_ids[:, :-1]), dim=1)


def ordinals(segment_ids: Tensor) -> Tensor:
    """Which document of its row each token is in, counted from 1; [b, s] int64.

    Not the number itself: that may come back later in the row.

    >>> ordinals(torch.tensor([[7, 7, 0, 7]]))
    tensor([[1, 1, 2, 3]])
    """
    return _opens(segment_ids).cumsum(dim=1)


@dataclass(frozen=True, kw_only=True)
class PackedSequences:
    """The documents of packed rows, row after row, as tensors: what they hold can change without a compiled graph changing.

    segment_ids [b, s] int32
    cu_seqlens  [documents + 1] int32: where each document of the flattened batch begins, and the end. In the fixed-shape form further
                entries repeat the end: documents without a token.
    host        the same on the CPU
    max_seqlen  tokens of the longest document, or in the fixed-shape form of a row
    """

    segment_ids: Tensor
    cu_seqlens: Tensor
    host: Tensor
    max_seqlen: int

    @classmethod
    def of(cls, segment_ids: Tensor | PackedSequences | None, *, fixed: bool = False) -> PackedSequences | None:
        """The documents of a batch; None when every row is one. Reads values, so on a GPU the CPU waits for them once.

        fixed: shapes and numbers that are the same for all batches of one shape, for compiled layers; never None

        >>> packed = PackedSequences.of(torch.tensor([[0, 0, 1], [0, 0, 0]]))
        >>> packed.lengths(), packed.max_seqlen
        ([2, 1, 3], 3)
        """
        if segment_ids is None or isinstance(segment_ids, PackedSequences):
            return segment_ids
        rows, length = segment_ids.shape
        starts = _opens(segment_ids).flatten().nonzero()[:, 0]
        documents = starts.shape[0]
        if documents == rows and not fixed:
            return None
        room = max(ROOM * rows, 1 << (documents - 1).bit_length()) if fixed else documents
        cu_seqlens = F.pad(starts, (0, room + 1 - documents), value=segment_ids.numel()).to(torch.int32)
        host = cu_seqlens.cpu()
        return cls(segment_ids=segment_ids, cu_seqlens=cu_seqlens, host=host, max_seqlen=length if fixed else int(host.diff().max()))

    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [count for count in self.host.diff().tolist() if count]


@dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """What queries see and how scores are made.

    documents: packed documents; None = each row is one
    offsets:   int64 [b], position of each row's first query, where rows have cached different numbers of tokens; None = the last query
               is level with the last key
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
    offsets: Tensor | None = None
    window: int | None = None
    scale: float
    divisor: float = 1.0
    bias: BiasOf | None = None
    slopes: Tensor | None = None
    dropout: float = 0.0
    seeds: tuple[int, ...] = ()
    fp32: bool = True

    def visible(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """Which keys each of the last `queries` of `keys` positions sees; bool [s, t], or [b, 1, s, t] where rows differ.

        A token sees itself and earlier ones; FORMAT: with a window, `window` of those (window + 1 in all).
        """
        behind = distances(queries, keys, device)
        if self.offsets is not None:  # the last query of row b is at offsets[b] + queries - 1, not at keys - 1
            behind = behind + (self.offsets + queries - keys)[:, None, None, None]
        see = behind >= 0
        if self.window is not None:
            see &= behind <= self.window
        if self.documents is None:
            return see
        ordinal = ordinals(self.documents.segment_ids)
        return see & (ordinal[:, :, None] == ordinal[:, None, :])[:, None]

    def added(self, queries: int, keys: int) -> Tensor | None:
        """What is added to the scores, [n, s, t], or [b, n, s, t] where rows differ; None = nothing."""
        if self.bias is None or self.offsets is None:
            return None if self.bias is None else self.bias(queries, keys)
        at = self.offsets[:, None] + torch.arange(queries, device=self.offsets.device)
        return self.bias(keys, keys)[:, at].transpose(0, 1)


def needs_no_mask(queries: int, keys: int, window: int | None) -> bool:
    """Whether plain causal attention says it all: no cache before a block of queries, no window that bites."""
    return queries == keys and (window is None or keys <= window + 1)
