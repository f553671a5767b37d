# SPDX-License-Identifier: Apache-2.0
"""Muon against torch's own, against singular values, and AdamW for the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megatron.model.spec import Positions
from megatron.model.transformer import Transformer
from megatron.mpu.roles import Role, roles_of
from megatron.optim.muon import Muon, deepspeed_muon, muon_groups, orthogonalise
from support.specs import model_spec


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
