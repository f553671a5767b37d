# SPDX-License-Identifier: Apache-2.0
"""Sampling against plain numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st


def expected(logits: npt.NDArray[np.float64], temperature: float, top_k: int, top_p: float) -> npt.NDArray[np.float64]:
    """Probabilities of one row, written with loops."""
    logits = logits / temperature if temperature > 0 else logits
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if top_k > 0:
        order = [token for token in order if logits[token] >= logits[order[min(top_k, len(order)) - 1]]]
    weights = {token: np.exp(logits[token] - logits[order[0]]) for token in order}
    if top_p > 0:
        total, before, kept = sum(weights.values()), 0.0, []
        for token in order:
            if before / total <= top_p:
                kept.append(token)
            before += weights[token]
        order = kept
    total = sum(weights[token] for token in order)
    return np.array([weights[token] / total if token in order else 0.0 for token in range(len(logits))])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    st.sampled_from([0, 1, 3, 7, 100]),
    st.sampled_from([0.0, 0.01, 0.5, 0.93, 1.0]),
)
def test_probabilities_equal_numpy(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    import torch

    from megatron.generation.sampling import Sampling, choose, probabilities

    rows = np.random.default_rng(seed).normal(size=(3, 11)) * 3
    got = probabilities(torch.tensor(rows), Sampling(temperature, top_k, top_p))
    for row in range(3):
        np.testing.assert_allclose(got[row].numpy(), expected(rows[row], temperature, top_k, top_p), atol=2e-6)
    if top_k == 1:
        assert choose(torch.tensor(rows), Sampling(temperature, 1, top_p), torch.rand(3)).tolist() == rows.argmax(1).tolist()


def test_ties_draws_greedy_and_rows_apart() -> None:
    import torch

    from megatron.generation.sampling import Sampling, choose, keep_top_k, pick

    kept = keep_top_k(torch.tensor([[1.0, 3.0, 2.0, 2.0]]), 2)
    assert torch.isfinite(kept).tolist() == [[False, True, True, True]], "ties with the last kept token stay"

    chances = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    counts = torch.bincount(pick(chances.expand(10_000, 6), uniform), minlength=6) / 10_000
    assert torch.allclose(counts, chances, atol=2e-4)
    edge = torch.tensor([0.0, 1.0 - 2.0**-24])
    assert pick(chances.expand(2, 6), edge).tolist() == [1, 4], "an impossible token is never drawn"

    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert choose(logits, Sampling()).tolist() == [1]
    assert Sampling().greedy and not Sampling(top_p=0.9).greedy and not Sampling(top_k=2).greedy
    assert choose(logits, Sampling(temperature=1.0), torch.tensor([0.999])).tolist() == [2]

    rows = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    drawn = torch.rand(4, generator=torch.Generator().manual_seed(0))
    together = choose(rows, Sampling(0.8, 20, 0.9), drawn)
    alone = [choose(rows[row : row + 1], Sampling(0.8, 20, 0.9), drawn[row : row + 1]).item() for row in range(4)]
    assert together.tolist() == alone
