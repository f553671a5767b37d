# SPDX-License-Identifier: Apache-2.0
"""Norms equal their formulas in double precision, in every dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.errors import ConfigError
from megatron.model.norms import HeadNorm, build_norm
from megatron.model.spec import NormKind, NormSpec
from megatron.mpu.groups import Group
from megatron.mpu.sharding import Split, sharding_of


def formula(kind: NormKind, x: Tensor, eps: float, dims: tuple[int, ...] = (-1,)) -> Tensor:
    x = x.double()
    if kind is NormKind.RMSNORM:
        return x / (x.square().mean(dims, keepdim=True) + eps).sqrt()
    if kind is NormKind.SCALENORM:
        return x / x.square().sum(dims, keepdim=True).sqrt().clamp(min=eps)
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


def test_formula_names_and_dtypes() -> None:
    for kind in NormKind:
        check_formula(kind)


def check_formula(kind: NormKind) -> None:
    torch.manual_seed(0)
    norm = build_norm(NormSpec(kind=kind, size=24, eps=1e-5))
    names = {"layernorm": ["weight", "bias"], "rmsnorm": ["scale"], "scalenorm": ["g"], "non_parametric_layernorm": []}[kind.value]
    assert [name for name, _ in norm.named_parameters()] == names
    parameters = [torch.nn.init.normal_(parameter) for parameter in norm.parameters()]
    x = torch.randn(3, 5, 24) * 3 + 1
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2)):
        norm = norm.to(dtype)
        expected = formula(kind, x.to(dtype), 1e-5)
        if parameters:
            expected = expected * parameters[0].detach().double()
        if len(parameters) == 2:
            expected = expected + parameters[1].detach().double()
        out = norm(x.to(dtype))
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_bias_can_be_left_out_and_zero_rows_are_finite() -> None:
    plain = build_norm(NormSpec(kind=NormKind.LAYERNORM, size=4, eps=1e-5, bias=False))
    assert [name for name, _ in plain.named_parameters()] == ["weight"]
    for kind in NormKind:
        assert build_norm(NormSpec(kind=kind, size=4, eps=1e-8))(torch.zeros(2, 4)).abs().sum() == 0


def test_head_norm_is_taken_over_all_heads() -> None:
    for kind in (NormKind.LAYERNORM, NormKind.RMSNORM):
        check_heads(kind)


def check_heads(kind: NormKind) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 8) * torch.arange(1.0, 5.0)[:, None]
    spec = NormSpec(kind=kind, size=32, eps=1e-5)
    expected = formula(kind, x, 1e-5, (-2, -1))
    for flat, shape in ((False, (4, 8)), (True, (32,))):
        norm = HeadNorm(spec, 4, 8, tp=Group.single(), flat=flat)
        assert next(norm.parameters()).shape == shape
        torch.testing.assert_close(norm(x).double(), expected, rtol=1e-5, atol=1e-5)
        assert set(sharding_of(norm).values()) == {Split(0)}
    with pytest.raises(ConfigError):
        HeadNorm(NormSpec(kind=NormKind.SCALENORM, size=8, eps=1e-5), 4, 8, tp=Group.single(), flat=False)
