# SPDX-License-Identifier: Apache-2.0
"""MADGRAD against the paper's algorithm in float64, with and without decay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from megatron.optim.groupwise import MADGRADW


def reference(start: np.ndarray, grads: list[np.ndarray], *, rates: list[float], momentum: float, decay: float) -> np.ndarray:
    """Alg. 1 of arXiv 2101.11075; the decay is taken from the weights alone."""
    weight, total, squares = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for k, (grad, lr) in enumerate(zip(grads, rates, strict=True)):
        share = lr * np.sqrt(k + 1)
        total, squares = total + share * grad, squares + share * grad**2
        target = start - total / (np.cbrt(squares) + 1e-6)
        weight = (1 - (1 - momentum)) * weight + (1 - momentum) * target - lr * decay * weight
    return weight


@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 0.0), (0.0, 0.0), (0.9, 0.3), (0.0, 0.3)])
def test_six_steps_equal_the_algorithm(momentum: float, decay: float) -> None:
    rng = np.random.default_rng(1)
    start, rates = rng.normal(size=(5, 3)), [0.0, 0.02, 0.05, 0.05, 0.03, 0.01]  # a schedule that starts at 0
    grads = [rng.normal(size=(5, 3)) for _ in rates]
    weight = nn.Parameter(torch.tensor(start, dtype=torch.float32))
    optimizer = MADGRADW([weight], momentum=momentum, weight_decay=decay)
    for grad, rate in zip(grads, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.tensor(grad, dtype=torch.float32)
        optimizer.step()
    expected = reference(start, grads, rates=rates, momentum=momentum, decay=decay)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=2e-5, atol=1e-6)


def test_flat_parts_are_updated_like_the_whole() -> None:
    """As ZeRO has it: entries do not depend on each other."""
    whole, flat = nn.Parameter(torch.arange(12.0).reshape(3, 4)), nn.Parameter(torch.arange(12.0)[4:9].clone())
    optimizers = MADGRADW([whole], weight_decay=0.1), MADGRADW([flat], weight_decay=0.1)
    for seed in range(3):
        grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        whole.grad, flat.grad = grad, grad.flatten()[4:9].clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(flat, whole.flatten()[4:9], rtol=1e-6, atol=1e-6)


def test_resume_is_exact_also_of_16_bit_weights() -> None:
    def train(optimizer: MADGRADW, weight: nn.Parameter, seeds: range) -> None:
        for seed in seeds:
            weight.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)).to(weight.dtype)
            optimizer.step()

    for dtype in (torch.float32, torch.bfloat16):
        first, second = (nn.Parameter(torch.ones(6, 4, dtype=dtype)) for _ in range(2))
        whole, half = MADGRADW([first], lr=0.1, weight_decay=0.1), MADGRADW([second], lr=0.1, weight_decay=0.1)
        train(whole, first, range(6))
        train(half, second, range(3))
        third = nn.Parameter(second.detach().clone())
        resumed = MADGRADW([third], lr=0.1, weight_decay=0.1)
        resumed.load_state_dict(half.state_dict())
        train(resumed, third, range(3, 6))
        assert torch.equal(third, first) and not torch.equal(third, second)
