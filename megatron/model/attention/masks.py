# SPDX-License-Identifier: Apache-2.0
"""What each token may see, derived from segment_ids, cache length and window. Knows no back end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.model.positions import distances


def document_positions(segment_ids: Tensor, before: int = 0) -> Tensor:
    """Position of every token within its document; segment_ids [b, s] -> [b, s] int64.

    before: tokens already in a cache; then a row is one document and positions go on from there

    >>> document_positions(torch.tensor([[0, 0, 1, 1, 1]]))
    tensor([[0, 1, 0, 1, 2]])
    """
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    if before:
        return (index + before).expand(segment_ids.shape)
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
    """The documents of packed rows, row after row.

    segment_ids [b, s] int32; lengths: tokens of each document (on the host); cu_seqlens [documents + 1] int32: where each begins
    """

    segment_ids: Tensor
    lengths: tuple[int, ...]
    cu_seqlens: Tensor

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    @classmethod
    def of(cls, segment_ids: Tensor | PackedSequences | None) -> PackedSequences | None:
        """The documents of a batch; None when every row is one. Reads values, so on a GPU the CPU waits for them once.

        >>> PackedSequences.of(torch.tensor([[0, 0, 1], [0, 0, 0]])).lengths
        (2, 1, 3)
        """
        if segment_ids is None or isinstance(segment_ids, PackedSequences):
            return segment_ids
        starts = _opens(segment_ids).flatten().nonzero()[:, 0]
        if starts.shape[0] == segment_ids.shape[0]:
            return None
        ends = torch.cat((starts, starts.new_tensor([segment_ids.numel()])))
        return cls(segment_ids=segment_ids, lengths=tuple(ends.diff().tolist()), cu_seqlens=ends.to(torch.int32))


def allowed(queries: int, keys: int, window: int | None, device: torch.device, documents: PackedSequences | None = None) -> Tensor:
    """Which keys each of the last `queries` of `keys` positions sees; bool [s, t], or [b, 1, s, t] with documents.

    A token sees itself and earlier ones; FORMAT: with a window, `window` of those (window + 1 in all).
    """
    behind = distances(queries, keys, device)
    see = behind >= 0
    if window is not None:
        see &= behind <= window
    if documents is None:
        return see
    ordinal = ordinals(documents.segment_ids)
    return see & (ordinal[:, :, None] == ordinal[:, None, :])[:, None]


def needs_no_mask(queries: int, keys: int, window: int | None) -> bool:
    """Whether plain causal attention says it all: no cache before a block of queries, no window that bites."""
    return queries == keys and (window is None or keys <= window + 1)
