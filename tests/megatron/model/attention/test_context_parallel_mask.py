# SPDX-License-Identifier: Apache-2.0
"""Tiles of attention put together see what whole rows see, and nothing is computed for nobody."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.model.attention.context_parallel import BlockMask
from megatron.model.attention.inputs import AttentionInputs, PackedSequences

S = 8
rows = st.lists(st.lists(st.integers(0, 1), min_size=S, max_size=S), min_size=1, max_size=3)


@settings(max_examples=80, deadline=None)
@given(rows=rows, window=st.none() | st.integers(0, S), cut=st.sampled_from([1, 2, 3, 8]))
def test_pieces_make_the_whole(rows: list[list[int]], window: int | None, cut: int) -> None:
    segment_ids = torch.tensor(rows, dtype=torch.int32)
    documents = PackedSequences.of(segment_ids)
    block_mask = BlockMask.of(documents, window, segment_ids.device)
    whole = torch.zeros(len(rows), S, S, dtype=torch.bool)
    for q in range(0, S, cut):
        queries = range(q, min(q + cut, S))
        for k in range(0, S, cut):
            keys = block_mask.seen(queries, range(k, min(k + cut, S)))
            if not keys:
                continue
            mask = block_mask.mask(queries, keys)
            piece = torch.ones(1, len(queries), len(keys), dtype=torch.bool) if mask is None else mask
            whole[:, queries.start : queries.stop, keys.start : keys.stop] = piece
            assert piece.any(dim=1).any(dim=0)[0], "the first key is seen by somebody"
    expected = (
        AttentionInputs(scale=1.0, window=window, documents=documents).visible(S, S, segment_ids.device).view(-1, S, S).expand_as(whole)
    )
    assert whole.equal(expected)


def test_plain_pieces_have_no_mask() -> None:
    block_mask = BlockMask.of(None, None, torch.device("cpu"))
    assert block_mask.mask(range(4, 8), range(0, 4)) is None and block_mask.mask(range(4, 8), range(0, 5)) is None
    assert block_mask.mask(range(4, 8), range(0, 6)) is not None
    assert not block_mask.seen(range(0, 4), range(4, 8)) and block_mask.seen(range(2, 6), range(4, 8)) == range(4, 6)
    assert BlockMask.of(None, 1, torch.device("cpu")).seen(range(4, 8), range(0, 4)) == range(3, 4)
