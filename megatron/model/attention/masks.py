# SPDX-License-Identifier: Apache-2.0
"""What each token may see, derived from segments, cache length and window. Knows no back end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.model.positions import distances


def document_positions(segments: Tensor, before: int = 0) -> Tensor:
    """Position of every token within its document; segments [b, s] -> [b, s] int64.

    before: tokens already in a cache; then a row is one document and positions go on from there

    >>> document_positions(torch.tensor([[0, 0, 1, 1, 1]]))
    tensor([[0, 1, 0, 1, 2]])
    """
    index = torch.arange(segments.shape[1], device=segments.device)
    if before:
        return (index + before).expand(segments.shape)
    start = torch.where(_opens(segments), index, 0).cummax(dim=1).values
    return index - start


def _opens(segments: Tensor) -> Tensor:
    """Whether a token is the first of its document; [b, s] bool."""
    first = torch.ones_like(segments[:, :1], dtype=torch.bool)
    return torch.cat((first, segments[:, 1:] != segments[:, :-1]), dim=1)


def ordinals(segments: Tensor) -> Tensor:
    """Which document of its row each token is in, counted from 1; [b, s] int64.

    Not the number itself: that may come back later in the row.

    >>> ordinals(torch.tensor([[7, 7, 0, 7]]))
    tensor([[1, 1, 2, 3]])
    """
    return _opens(segments).cumsum(dim=1)


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The documents of packed rows, row after row.

    segments [b, s] int32; lengths: tokens of each document (on the host); cu_seqlens [documents + 1] int32: where each begins
    """

    segments: Tensor
    lengths: tuple[int, ...]
    cu_seqlens: Tensor

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    @classmethod
    def of(cls, segments: Tensor | Documents | None) -> Documents | None:
        """The documents of a batch; None when every row is one. Reads values, so on a GPU the CPU waits for them once.

        >>> Documents.of(torch.tensor([[0, 0, 1], [0, 0, 0]])).lengths
        (2, 1, 3)
        """
        if segments is None or isinstance(segments, Documents):
            return segments
        starts = _opens(segments).flatten().nonzero()[:, 0]
        if starts.shape[0] == segments.shape[0]:
            return None
        ends = torch.cat((starts, starts.new_tensor([segments.numel()])))
        return cls(segments=segments, lengths=tuple(ends.diff().tolist()), cu_seqlens=ends.to(torch.int32))


def allowed(queries: int, keys: int, window: int | None, device: torch.device, documents: Documents | None = None) -> Tensor:
    """Which keys each of the last `queries` of `keys` positions sees; bool [s, t], or [b, 1, s, t] with documents.

    A token sees itself and earlier ones; FORMAT: with a window, `window` of those (window + 1 in all).
    """
    behind = distances(queries, keys, device)
    see = behind >= 0
    if window is not None:
        see &= behind <= window
    if documents is None:
        return see
    ordinal = ordinals(documents.segments)
    return see & (ordinal[:, :, None] == ordinal[:, None, :])[:, None]


def needs_no_mask(queries: int, keys: int, window: int | None) -> bool:
    """Whether plain causal attention says it all: no cache before a block of queries, no window that bites."""
    return queries == keys and (window is None or keys <= window + 1)
