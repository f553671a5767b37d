# SPDX-License-Identifier: Apache-2.0
"""What a run of queries sees of a run of keys, for attention that is computed in pieces.

Where documents begin is known on the host, so a piece that nobody sees is never computed, and one that all see has no mask.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megatron.model.attention.inputs import PackedSequences, ordinals


@dataclass(frozen=True, kw_only=True)
class BlockMask:
    """Causal, within a window, within documents; positions count from the beginning of a whole row.

    starts:   where the documents of each row begin; None = each row is one
    numbers:  [b, s] which document of its row a token is in
    """

    device: torch.device
    window: int | None = None
    starts: tuple[tuple[int, ...], ...] | None = None
    numbers: Tensor | None = None

    @classmethod
    def of(cls, documents: PackedSequences | None, window: int | None, device: torch.device) -> BlockMask:
        """That of whole rows."""
        if documents is None:
            return cls(device=device, window=window)
        length = documents.segment_ids.shape[1]
        rows: list[list[int]] = [[] for _ in range(documents.segment_ids.shape[0])]
        for start in accumulate(documents.lengths()[:-1], initial=0):
            rows[start // length].append(start % length)
        starts = tuple(tuple(row) for row in rows)
        return cls(device=device, window=window, starts=starts, numbers=ordinals(documents.segment_ids))

    def seen(self, queries: range, keys: range) -> range:
        """The keys outside which no query of any row sees anything; empty when the two are strangers."""
        first = queries.start
        back = 0 if self.starts is None else min(self._openings(first))
        if self.window is not None:
            back = max(back, first - self.window)
        return range(max(keys.start, back), max(min(keys.stop, queries.stop), keys.start, back))

    def mask(self, queries: range, keys: range) -> Tensor | None:
        """Which queries see which keys, bool [b or 1, q, k]; None = all see all."""
        last = queries.stop - 1
        # Every row's last query must be in a document that has begun when the keys do.
        one_document = self.starts is None or max(self._openings(last)) <= keys.start
        near = self.window is None or last - keys.start <= self.window
        if one_document and near and keys.stop - 1 <= queries.start:
            return None
        q, k = (torch.arange(run.start, run.stop, device=self.device) for run in (queries, keys))
        behind = q[:, None] - k
        see = (behind >= 0)[None]
        if self.window is not None:
            see = see & (behind <= self.window)
        if self.numbers is None or one_document:
            return see
        return see & (self.numbers[:, queries.start : queries.stop, None] == self.numbers[:, None, keys.start : keys.stop])

    def _openings(self, position: int) -> list[int]:
        """Where each row's document at a position begins."""
        assert self.starts is not None
        return [row[bisect_right(row, position) - 1] for row in self.starts]
