# SPDX-License-Identifier: Apache-2.0
"""Properties of the three packings, each against a plain loop over documents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data import index_map
from megatron.errors import DataError

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=20).map(lambda sizes: np.array(sizes, dtype=np.int32))
FEW = settings(max_examples=80, deadline=None)


def tape_of(sizes: np.ndarray, documents: np.ndarray) -> list[tuple[int, int]]:
    return [(int(document), place) for document in documents for place in range(sizes[document])]


@FEW
@given(sizes=SIZES, seq_length=st.integers(1, 12), num_samples=st.integers(0, 40), seed=st.integers(0, 99), first=st.integers(0, 5))
def test_packed_reads_every_token_once_an_epoch(sizes: np.ndarray, seq_length: int, num_samples: int, seed: int, first: int) -> None:
    documents = (min(first, len(sizes) - 1), len(sizes))
    if sizes[documents[0] :].sum() < max(2, seq_length + 1):
        return
    epochs = index_map.epochs_for(sizes, documents, seq_length, num_samples)
    made = index_map.packed(sizes, documents, seq_length, seed, num_epochs=epochs)
    counts = np.bincount(made.documents, minlength=len(sizes))
    assert (counts[documents[0] :] == epochs).all() and (counts[: documents[0]] == 0).all()
    assert sorted(made.shuffle.tolist()) == list(range(len(made.shuffle))) and len(made.shuffle) >= num_samples
    tape = tape_of(sizes, made.documents)
    assert len(tape) - seq_length <= len(made.shuffle) * seq_length + 1 <= len(tape)
    ends = np.concatenate([[0], np.cumsum(sizes[made.documents])])
    for row, (position, offset) in enumerate(made.samples.tolist()):
        assert ends[position] + offset == row * seq_length and (row == 0 or offset < sizes[made.documents[position]])


def plain_overflow(sizes: np.ndarray, documents: list[int], capacity: int) -> list[int]:
    starts, filled = [0], 0
    for place, document in enumerate(documents):
        if filled and filled + sizes[document] > capacity:
            starts.append(place)
            filled = 0
        filled += int(sizes[document])
    return starts


@FEW
@given(sizes=SIZES, seq_length=st.integers(1, 40), num_samples=st.integers(1, 40), seed=st.integers(0, 99))
def test_overflow_packs_whole_documents_greedily(sizes: np.ndarray, seq_length: int, num_samples: int, seed: int) -> None:
    keep = index_map.usable(sizes, None, seq_length, allow_chopped=bool(seed % 2))
    documents = (len(sizes) // 3, len(sizes))
    if not keep[documents[0] :].any():
        with pytest.raises(DataError, match="can be used"):
            index_map.pack_until_overflow(sizes, keep, documents, seq_length, seed, num_samples=num_samples)
        return
    made = index_map.pack_until_overflow(sizes, keep, documents, seq_length, seed, num_samples=num_samples)
    assert made.samples.shape == (num_samples + 1, 2) and sorted(made.shuffle.tolist()) == list(range(num_samples))
    assert keep[made.documents].all() and made.documents.min() >= documents[0]
    assert plain_overflow(sizes, made.documents.tolist(), seq_length + 1) == made.samples[:-1, 0].tolist()
    once = documents[0] + np.flatnonzero(keep[documents[0] :])
    for epoch in range(len(made.documents) // len(once)):
        assert sorted(made.documents[epoch * len(once) : (epoch + 1) * len(once)].tolist()) == once.tolist()


@FEW
@given(sizes=SIZES, num_samples=st.integers(0, 60), seed=st.integers(0, 99))
def test_unpacked_reads_documents_equally_often(sizes: np.ndarray, num_samples: int, seed: int) -> None:
    keep = index_map.usable(sizes, None, 8, allow_chopped=False)
    assert (keep == ((sizes > 0) & (sizes <= 9))).all()
    if keep.any():
        made = index_map.unpacked(keep, (0, len(sizes)), seed, num_samples=num_samples)
        counts = np.bincount(made.documents[made.shuffle], minlength=len(sizes))
        assert (counts[~keep] == 0).all() and np.ptp(counts[keep]) <= 1 and counts.sum() == num_samples


@FEW
@given(sizes=SIZES, seq_length=st.integers(1, 12), seed=st.integers(0, 99), block=st.integers(1, 64))
def test_trained_documents_against_a_loop(sizes: np.ndarray, seq_length: int, seed: int, block: int) -> None:
    labels = np.where(np.random.RandomState(seed).rand(sizes.sum()) < 0.1, 7, -100)
    ends = np.cumsum(sizes)
    expected = [bool((labels[end - size : end][1 : seq_length + 1] >= 0).any()) for size, end in zip(sizes, ends, strict=True)]
    assert index_map.trained_documents(labels, sizes, seq_length, block=block).tolist() == expected


def test_too_little_data_says_so() -> None:
    with pytest.raises(DataError, match="too few"):
        index_map.packed(np.array([3], dtype=np.int32), (0, 1), 64, 1)
    with pytest.raises(DataError, match="too few"):
        index_map.packed(np.array([3], dtype=np.int32), (1, 1), 64, 1)
