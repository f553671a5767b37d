# SPDX-License-Identifier: Apache-2.0
"""SM3 against the paper's algorithm in float64, written with sets of indices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from megatron.optim.groupwise import SM3


def reference(start: np.ndarray, grads: list[np.ndarray], *, lr: float, momentum: float, beta: float, decay: float) -> np.ndarray:
    """Alg. SM3-II (arXiv 1901.11150), entry by entry: cover sets are pairs (dimension, index)."""
    weight, moment = start.copy(), np.zeros_like(start)
    cover = {(dim, index): 0.0 for dim in range(start.ndim) for index in range(start.shape[dim])}
    for grad in grads:
        fresh = dict.fromkeys(cover, 0.0)
        update = np.zeros_like(start)
        for place in itertools.product(*map(range, start.shape)):
            sets = [(dim, index) for dim, index in enumerate(place)]
            known = min(cover[one] for one in sets)
            seen = (beta or 1.0) * known + (1 - beta if beta else 1.0) * grad[place] ** 2
            update[place] = grad[place] / np.sqrt(seen) if seen > 0 else 0.0
            for one in sets:
                fresh[one] = max(fresh[one], seen)
        cover = fresh
        moment = momentum * moment + (1 - momentum) * update
        weight = weight * (1 - lr * decay) - lr * moment
    return weight


@pytest.mark.parametrize(("momentum", "beta"), [(0.0, 0.0), (0.9, 0.0), (0.5, 0.95)])
def test_five_steps_equal_the_algorithm(momentum: float, beta: float) -> None:
    rng = np.random.default_rng(0)
    for shape in ((4, 3), (5,), (2, 3, 4)):
        start = rng.normal(size=shape)
        grads = [rng.normal(size=shape) * (rng.random(shape) > 0.3) for _ in range(5)]
        weight = nn.Parameter(torch.tensor(start, dtype=torch.float32))
        optimizer = SM3([weight], lr=0.05, momentum=momentum, beta=beta, weight_decay=0.1)
        for grad in grads:
            weight.grad = torch.tensor(grad, dtype=torch.float32)
            optimizer.step()
        expected = reference(start, grads, lr=0.05, momentum=momentum, beta=beta, decay=0.1)
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=str(shape))


def test_memory_is_rows_and_columns() -> None:
    weight, scalar = nn.Parameter(torch.ones(30, 20)), nn.Parameter(torch.ones(()))
    optimizer = SM3([weight, scalar])
    weight.grad, scalar.grad = torch.ones(30, 20), torch.tensor(3.0)
    optimizer.step()
    assert {name: tuple(value.shape) for name, value in optimizer.state[weight].items()} == {"cover_0": (30,), "cover_1": (20,)}
    assert float(scalar) == pytest.approx(0.9), "a scalar is Adagrad's: a step of lr"


def test_resume_is_exact_and_16_bit_weights_have_float32_sums() -> None:
    def train(optimizer: SM3, weight: nn.Parameter, seeds: range) -> None:
        for seed in seeds:
            weight.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)).to(weight.dtype)
            optimizer.step()

    first, second = (nn.Parameter(torch.ones(6, 4, dtype=torch.bfloat16)) for _ in range(2))
    whole, half = SM3([first], momentum=0.9, lr=0.01), SM3([second], momentum=0.9, lr=0.01)
    train(whole, first, range(6))
    train(half, second, range(3))
    third = nn.Parameter(second.detach().clone())
    resumed = SM3([third], momentum=0.9, lr=0.01)
    resumed.load_state_dict(half.state_dict())
    train(resumed, third, range(3, 6))
    assert torch.equal(third, first) and not torch.equal(third, second)
    assert whole.state[first]["cover_0"].dtype == torch.float32 == resumed.state[third]["cover_0"].dtype
