# SPDX-License-Identifier: Apache-2.0
"""Lengths: fits and waste against a published table, and counts against plain Python."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.inspect.lengths import LIMITS, Lengths, fit, of_pairs, recommend, summarise
from megatron.data.inspect.padding import Setup, packed, waste
from megatron.errors import DataError

THINK, INSTRUCT = (7.668, 1.202), (6.525, 0.998)


def draws(mu: float, sigma: float, n: int = 65536, rho: float = 0.7) -> np.ndarray:
    """[n, 2] lognormal lengths of pairs whose logarithms correlate."""
    chosen, other = np.random.default_rng(0).standard_normal((2, n))
    return np.exp(mu + sigma * np.stack([chosen, rho * chosen + math.sqrt(1 - rho**2) * other], axis=1)).astype(np.int64)


@pytest.mark.parametrize(("of", "limit", "share", "median", "p95"), [(THINK, 8192, 0.868, 2138, 15433), (INSTRUCT, 4096, 0.964, 682, 3521)])
def test_fits_and_shares(of: tuple[float, float], limit: int, share: float, median: float, p95: float) -> None:
    report = summarise(of_pairs(np.zeros(65536, int), *draws(*of).T), Setup(batch=8, ranks=1))
    for name in ("chosen", "rejected"):
        column = report.columns[name]
        assert column.within[limit] == pytest.approx(share, abs=0.004)
        assert column.lengths["median"] == pytest.approx(median, rel=0.015) and column.lengths["p95"] == pytest.approx(p95, rel=0.03)
        assert column.fit is not None and column.fit.gap < 0.01
        assert (column.fit.mu, column.fit.sigma) == (pytest.approx(of[0], abs=0.015), pytest.approx(of[1], abs=0.015))
        assert column.fit.share_within(limit) == pytest.approx(share, abs=0.004)


class Row(NamedTuple):
    """One row of the table: utilisation, time and time with ZeRO-3 of each mode (4 GPUs, 128 pairs a step)."""

    of: tuple[float, float]
    limit: int
    micro: int
    random: tuple[float, float, float]
    grouped: tuple[float, float, float]
    ordered: tuple[float, float, float]
    free: tuple[float, float]
    fixed: float


# From an independent simulation of the same fits.
TABLE = [
    Row(THINK, 8192, 4, (0.453, 2.53, 2.73), (0.800, 1.28, 1.28), (0.801, 1.27, 1.27), (1.15, 1.45), 0.38),
    Row(THINK, 8192, 8, (0.399, 2.74, 2.75), (0.800, 1.28, 1.28), (0.800, 1.28, 1.28), (1.15, 1.31), 0.38),
    Row(THINK, 16384, 4, (0.371, 3.46, 4.47), (0.766, 1.36, 1.36), (0.769, 1.34, 1.34), (1.21, 1.63), 0.23),
    Row(INSTRUCT, 4096, 4, (0.406, 2.94, 3.72), (0.787, 1.31, 1.31), (0.790, 1.28, 1.28), (1.17, 1.50), 0.25),
    Row(INSTRUCT, 2048, 8, (0.447, 2.35, 2.35), (0.821, 1.24, 1.24), (0.822, 1.23, 1.23), (1.12, 1.25), 0.43),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.limit}-{row.micro}")
def test_waste_is_that_of_the_table(row: Row) -> None:
    modes, _ = waste(np.minimum(draws(*row.of), row.limit), Setup(micro=row.micro), row.limit)
    for mode, expected in zip(modes[1:4], (row.random, row.grouped, row.ordered), strict=True):
        assert mode.utilisation == pytest.approx(expected[0], abs=0.01), mode
        assert (mode.time, mode.time_each) == pytest.approx(expected[1:], rel=0.03), mode
        assert mode.peak == 2 * row.micro * row.limit
    assert modes[0].utilisation == pytest.approx(row.fixed, abs=0.01)
    assert modes[4].utilisation == 1 and (modes[4].time, modes[4].time_each) == pytest.approx(row.free, rel=0.03)


@pytest.mark.parametrize(
    ("of", "limit", "capacity", "utilisation", "steps"),
    [(THINK, 8192, 16384, 0.9966, 13.0), (THINK, 8192, 65536, 0.9988, 3.6), (INSTRUCT, 4096, 16384, 0.9956, 4.5)],
)
def test_packing_is_that_of_the_table(of: tuple[float, float], limit: int, capacity: int, utilisation: float, steps: float) -> None:
    mode = packed(np.minimum(draws(*of), limit)[: 128 * 100], Setup(capacity=capacity))
    assert mode.utilisation == pytest.approx(utilisation, abs=0.001) and mode.micro_steps == pytest.approx(steps, rel=0.04)
    assert 1 <= mode.time <= mode.time_each < 1.02 and mode.peak <= capacity


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), min_size=1, max_size=40), micro=st.integers(1, 3))
def test_any_set_gives_sound_numbers(rows: list[tuple[int, int]], micro: int) -> None:
    limit = 64
    modes, capacity = waste(np.array(rows), Setup(ranks=2, batch=8, micro=micro), limit)
    assert capacity >= 2 * limit and len({mode.name for mode in modes}) == len(modes) == 6
    for mode in modes:
        assert 0 < mode.utilisation <= 1 and mode.time <= mode.time_each * (1 + 1e-9) and mode.time >= 1 - 1e-9
    assert modes[-1].peak <= capacity
    assert waste(np.array(rows), Setup(ranks=2, batch=8, micro=micro), limit)[0] == modes  # seeded


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
        Setup(ranks=1, batch=2, micro=1),
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
        summarise(Lengths(np.zeros((3, 1), int)), Setup())
    with pytest.raises(DataError, match="--coverage"):
        recommend(np.array([1]), 1.5)
    with pytest.raises(DataError, match="cannot hold"):
        waste(np.array([[50, 60]]), Setup(capacity=100), 64)
    assert fit(np.zeros(3, int)) is None
