# SPDX-License-Identifier: Apache-2.0
"""Lengths: shares against a published table, and counts against plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.inspect.lengths import LIMITS, Lengths, of_pairs, recommend, summarise
from megatron.errors import DataError

THINK, INSTRUCT = (7.668, 1.202), (6.525, 0.998)


def draws(mu: float, sigma: float, n: int = 65536, rho: float = 0.7) -> np.ndarray:
    """[n, 2] lognormal lengths of pairs whose logarithms correlate."""
    chosen, other = np.random.default_rng(0).standard_normal((2, n))
    return np.exp(mu + sigma * np.stack([chosen, rho * chosen + math.sqrt(1 - rho**2) * other], axis=1)).astype(np.int64)


@pytest.mark.parametrize(("of", "limit", "share", "median", "p95"), [(THINK, 8192, 0.868, 2138, 15433), (INSTRUCT, 4096, 0.964, 682, 3521)])
def test_percentiles_and_shares(of: tuple[float, float], limit: int, share: float, median: float, p95: float) -> None:
    report = summarise(of_pairs(np.zeros(65536, int), *draws(*of).T))
    for name in ("chosen", "rejected"):
        column = report.columns[name]
        assert column.within[limit] == pytest.approx(share, abs=0.004)
        assert column.lengths["median"] == pytest.approx(median, rel=0.015) and column.lengths["p95"] == pytest.approx(p95, rel=0.03)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.integers(1, 5000), min_size=1, max_size=30), coverage=st.floats(0.01, 1))
def test_the_recommended_length_is_the_smallest_that_covers(values: list[int], coverage: float) -> None:
    found = recommend(np.array(values), coverage)
    assert found & (found - 1) == 0
    assert sum(value <= found for value in values) / len(values) >= coverage - 1e-9
    assert found == 1 or sum(value <= found // 2 for value in values) / len(values) < coverage


def test_what_a_cut_loses_and_costs() -> None:
    # whole, cut inside the answer, prompt fills the limit exactly, prompt longer, nothing trained at all
    prompt = [10, 1000, 1024, 2000, 30]
    report = summarise(
        of_pairs(prompt, [20, 1500, 1030, 3000, 30], [15, 1025, 1025, 2001, 40]),
        max_length=1024,
        tokens_per_second=2.0,
    )
    assert report.prompt_exceeds == {limit: (0.2 if limit < 2000 else 0) for limit in LIMITS}
    assert report.nothing_trained is not None and report.nothing_trained[1024] == pytest.approx(0.6)
    assert report.nothing_trained[2048] == pytest.approx(0.2)
    assert report.recommended == 4096 and report.max_length == 1024
    assert report.tokens == 20 + 15 + 6 * 1024 + 30 + 40 and report.hours == pytest.approx(report.tokens / 7200)


def test_what_is_refused() -> None:
    with pytest.raises(DataError, match="pair 1 has a prompt of 9"):
        of_pairs([1, 9], [2, 9], [2, 8])
    with pytest.raises(DataError, match="no sample"):
        summarise(Lengths(np.zeros((3, 1), int)))
    with pytest.raises(DataError, match="--coverage"):
        recommend(np.array([1]), 1.5)
