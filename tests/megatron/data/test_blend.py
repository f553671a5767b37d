# SPDX-License-Identifier: Apache-2.0
"""Mixtures: the recorded order, the greedy rule against a plain loop, shares, and members that are too short."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.blend import MANY, BlendedDataset, _lagging, _lagging_many, blend_indices, normalise, split_bounds
from megatron.errors import ConfigError, DataError

MANIFEST = json.loads((Path(__file__).parents[2] / "golden" / "samples" / "manifest.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", ["blend_helper_h1", "blend_helper_h2", "blend_helper_h3"])
def test_recorded_indices(case: str) -> None:
    recorded = MANIFEST[case]
    members, ranks = blend_indices(recorded["weights"], len(recorded["dataset_index"]))
    assert members.tolist() == recorded["dataset_index"] and ranks.tolist() == recorded["dataset_sample_index"]
    assert (members.dtype, ranks.dtype) == (np.uint8, np.int64)


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=MANY + 4), num_samples=st.integers(0, 200))
def test_shares_hold_at_every_step(weights: list[float], num_samples: int) -> None:
    weights = normalise(weights)
    members, ranks = blend_indices(weights, num_samples)
    assert (_lagging(weights, num_samples, np.uint8) == _lagging_many(weights, num_samples, np.uint8)).all()
    for member, weight in enumerate(weights):
        places = np.flatnonzero(members == member)
        assert ranks[places].tolist() == list(range(len(places)))
        # Sample k of a member comes when its share has grown to k.
        assert all(weight * max(int(place), 1) >= k - 1e-9 for k, place in enumerate(places))


def test_more_than_255_members_and_members_that_are_too_short() -> None:
    members, _ = blend_indices([1 / 300] * 300, 600)
    assert members.dtype == np.int32 and np.bincount(members).tolist() == [2] * 300

    class Short:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            return {"text": np.array([index])}

    indices = blend_indices([0.5, 0.5], 8)
    with pytest.raises(DataError, match="member 0 of the mixture has 3 samples, 4 are wanted"):
        BlendedDataset([Short(), Short()], *indices)
    mixed = BlendedDataset([Short(), Short()], *blend_indices([0.5, 0.5], 6))
    assert [mixed[i]["text"].tolist() for i in range(len(mixed))] == [[0], [0], [1], [1], [2], [2]]
    with pytest.raises(IndexError):
        mixed[6]


@pytest.mark.parametrize("wrong", ["", "a,b", "-1,2", "0", "1,2,3,4", "nan"])
def test_unreadable_splits_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError):
        split_bounds(wrong, 10)


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.floats(0, 100), min_size=1, max_size=3).filter(lambda parts: sum(parts) > 0.01), count=st.integers(0, 500))
def test_splits_cover_all_documents_in_order(parts: list[float], count: int) -> None:
    bounds = split_bounds(",".join(map(repr, parts)), count)
    assert bounds[0] == 0 and bounds[-1] == count and bounds == sorted(bounds)


@pytest.mark.parametrize("wrong", [[], [0.0, 0.0], [-1.0, 2.0], [float("inf")]])
def test_weights_that_weigh_nothing_are_refused(wrong: list[float]) -> None:
    with pytest.raises(ConfigError):
        normalise(wrong)
