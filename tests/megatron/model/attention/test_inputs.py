# SPDX-License-Identifier: Apache-2.0
"""Positions, documents and visibility follow from segment_ids; checked against a double loop."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.model.attention.inputs import ROOM, AttentionInputs, PackedSequences, document_positions, needs_no_mask

rows = st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(rows=rows, window=st.none() | st.integers(0, 4))
def test_against_a_loop(rows: list[list[int]], window: int | None) -> None:
    segment_ids = torch.tensor(rows, dtype=torch.int32)
    starts = [[max(j for j in range(i + 1) if j == 0 or row[j] != row[j - 1]) for i in range(6)] for row in rows]
    assert document_positions(segment_ids).tolist() == [[i - start[i] for i in range(6)] for start in starts]
    documents = PackedSequences.of(segment_ids)
    if documents is None:
        assert all(len(set(row)) == 1 for row in rows)
        assert needs_no_mask(6, 6, window) == (window is None or window >= 5)
        return
    assert documents.lengths() == [start.count(first) for start in starts for first in sorted(set(start))]
    assert documents.cu_seqlens.diff().tolist() == documents.lengths() and documents.max_seqlen == max(documents.lengths())
    fixed = PackedSequences.of(segment_ids, fixed=True)
    assert fixed is not None and fixed.lengths() == documents.lengths() and fixed.max_seqlen == 6
    assert fixed.cu_seqlens.shape == (ROOM * len(rows) + 1,) and int(fixed.cu_seqlens[-1]) == segment_ids.numel()
    see = AttentionInputs(scale=1.0, window=window, documents=documents).visible(6, 6, segment_ids.device)
    reach = 6 if window is None else window
    expected = [[[[j >= start[i] and 0 <= i - j <= reach for j in range(6)] for i in range(6)]] for start in starts]
    assert see.tolist() == expected


def test_a_cache_moves_the_queries() -> None:
    here = torch.device("cpu")
    plain = AttentionInputs(scale=1.0, window=1)
    assert plain.visible(2, 5, here).tolist() == [[False, False, True, True, False], [False, False, False, True, True]]
    level = AttentionInputs(scale=1.0, window=1, offsets=torch.tensor([3, 1])).visible(2, 5, here)
    assert torch.equal(level[0, 0], plain.visible(2, 5, here)) and torch.equal(level[1, 0, :, :3], plain.visible(2, 3, here))
    assert not level[1, 0, :, 3:].any()
    assert not needs_no_mask(2, 5, None) and needs_no_mask(5, 5, 4) and not needs_no_mask(5, 5, 3)
