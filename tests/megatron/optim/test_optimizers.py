# SPDX-License-Identifier: Apache-2.0
"""Our own optimizers against the formulas of their papers in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from megatron.model.spec import Positions
from megatron.model.transformer import Transformer
from megatron.mpu.sharding import Role, roles_of
from megatron.optim.groups import muon_groups
from megatron.optim.optimizers import MADGRADW, SM3, Muon, deepspeed_muon, orthogonalise
from support.specs import model_spec


def sm3_reference(start: np.ndarray, grads: list[np.ndarray], *, lr: float, momentum: float, beta: float, decay: float) -> np.ndarray:
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
        expected = sm3_reference(start, grads, lr=0.05, momentum=momentum, beta=beta, decay=0.1)
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


def madgrad_reference(start: np.ndarray, grads: list[np.ndarray], *, rates: list[float], momentum: float, decay: float) -> np.ndarray:
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
    expected = madgrad_reference(start, grads, rates=rates, momentum=momentum, decay=decay)
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


def gradient(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of(matrix: nn.Parameter, vector: nn.Parameter) -> list[dict[str, Any]]:
    return [
        {"params": [matrix], "weight_decay": 0.1, "use_muon": True},
        {"params": [vector], "weight_decay": 0.2, "use_muon": False},
    ]


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_singular_values_are_near_one_and_directions_stay(shape: tuple[int, int]) -> None:
    matrix = gradient(shape, 0)
    made = orthogonalise(matrix)
    values = torch.linalg.svdvals(made)
    assert 0.6 < float(values.min()) and float(values.max()) < 1.25
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ made @ right.T
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), atol=1e-3, rtol=0)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_matrices_are_updated_as_by_torch(shape: tuple[int, int], nesterov: bool) -> None:
    """torch iterates in bfloat16, we in float32."""
    mine, theirs, vector = nn.Parameter(gradient(shape, 9)), nn.Parameter(gradient(shape, 9)), nn.Parameter(torch.ones(3))
    ours = Muon(of(mine, vector), lr=0.1, momentum=0.9, nesterov=nesterov)
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn="original")
    for seed in range(6):
        mine.grad, theirs.grad = gradient(shape, seed), gradient(shape, seed)
        ours.step()
        reference.step()
    assert float((mine - gradient(shape, 9)).norm()) > 0.5
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0.02)


def test_the_rest_is_updated_by_adamw() -> None:
    matrix, vector, theirs = nn.Parameter(torch.ones(2, 2)), nn.Parameter(gradient((7,), 1)), nn.Parameter(gradient((7,), 1))
    ours = Muon(of(matrix, vector), lr=0.1, betas=(0.8, 0.9), eps=1e-6)
    reference = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    for seed in range(6):
        vector.grad, theirs.grad = gradient((7,), seed), gradient((7,), seed)
        ours.step()
        reference.step()
    torch.testing.assert_close(vector, theirs, rtol=1e-5, atol=1e-6)
    assert bool((matrix == 1.0).all()), "what has no gradient stays, undecayed"


def test_resume_is_exact_and_decay_is_decoupled() -> None:
    def make() -> tuple[list[nn.Parameter], Muon]:
        parameters = [nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(5))]
        return parameters, Muon(of(*parameters), lr=0.01)

    def train(parameters: list[nn.Parameter], optimizer: Muon, seeds: range) -> None:
        for seed in seeds:
            for parameter in parameters:
                parameter.grad = gradient(tuple(parameter.shape), seed)
            optimizer.step()

    (first, whole), (second, half), (third, resumed) = make(), make(), make()
    train(first, whole, range(6))
    train(second, half, range(3))
    for to, source in zip(third, second, strict=True):
        to.data.copy_(source.data)
    resumed.load_state_dict(half.state_dict())
    train(third, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    # Without a gradient nothing but decay is left: momentum 0 and a zero gradient.
    parameters, optimizer = make()
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert float(parameters[0][0, 0]) == pytest.approx(1 - 0.01 * 0.1) and float(parameters[1][0]) == pytest.approx(1 - 0.01 * 0.2)


def test_groups_follow_roles() -> None:
    model = Transformer(model_spec(positions=Positions.LEARNED, tied=True))
    roles = roles_of(model)
    groups = muon_groups(model, 0.1, matrix_mult=20.0)
    kinds = [({roles[id(p)] for p in group["params"]}, group["use_muon"], group["weight_decay"], group["lr_mult"]) for group in groups]
    assert kinds == [({Role.EMBEDDING}, False, 0.1, 1.0), ({Role.VECTOR}, False, 0.0, 1.0), ({Role.HIDDEN}, True, 0.1, 20.0)]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_deepspeeds_form_knows_its_parameters() -> None:
    matrix, vector = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3))
    groups = [{**group, "lr_mult": 1.0} for group in of(matrix, vector)]
    made = deepspeed_muon(groups, {"lr": 0.1, "momentum": 0.8, "betas": (0.5, 0.6)})
    assert matrix.use_muon and not vector.use_muon  # type: ignore[attr-defined]
    first, second = made.param_groups
    assert (first["momentum"], first["weight_decay"], first["ns_method"]) == (0.8, 0.1, "standard")
    assert (second["betas"], second["weight_decay"], second["lr_mult"]) == ((0.5, 0.6), 0.2, 1.0)
