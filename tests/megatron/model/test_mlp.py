# SPDX-License-Identifier: Apache-2.0
"""The MLP against its formula, whole and in tensor parallel shares."""

import math

import pytest
import torch

from megatron.errors import ConfigError
from megatron.model.mlp import GATES, MLP, PLAIN, activation_of
from megatron.model.spec import GATED, MLPSpec
from megatron.mpu.groups import Group
from megatron.mpu.sharding import sharding_of, split


@pytest.mark.parametrize("bias", [True, False])
def test_mlp_is_its_formula(bias: bool):
    torch.manual_seed(0)
    for name in ("gelu", *GATED):
        mlp = MLP(MLPSpec(hidden_size=8, width=6, activation=name, bias=bias), tp=Group.single())
        x = torch.randn(2, 3, 8)
        inner = x @ mlp.linear1.weight.T + (mlp.linear1.bias if bias else 0)
        # the first half of the rows is the value, the second the gate
        inner = inner[..., :6] * activation_of(name)(inner[..., 6:]) if name in GATED else activation_of(name)(inner)
        torch.testing.assert_close(mlp(x), inner @ mlp.linear2.weight.T + (mlp.linear2.bias if bias else 0))


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_shares_sum_to_the_whole(name: str):
    torch.manual_seed(0)
    spec = MLPSpec(hidden_size=8, width=6, activation=name)
    whole = MLP(spec, tp=Group.single(), defer_reduce=True)
    whole.linear1.bias.data.normal_()
    whole.linear2.bias.data.normal_()
    x, shares = torch.randn(2, 3, 8), []
    for rank in range(2):
        share = MLP(spec, tp=Group(rank=rank, size=2), defer_reduce=True)
        how = sharding_of(share)
        share.load_state_dict({key: split(value, how[key], rank, 2) for key, value in whole.state_dict().items()})
        shares.append(share(x))
    torch.testing.assert_close(shares[0] + shares[1], whole(x))


def test_formulas():
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    sigmoid = 1 / (1 + torch.exp(-x))
    expected = {
        "gelu": x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu": x.clamp(min=0),
        "softsign": x / (1 + x.abs()),
        "swish": x * sigmoid,
        "silu": x * sigmoid,
        "mish": x * torch.tanh(torch.log1p(torch.exp(x))),
        "bilinear": x,
        "glu": sigmoid,
    }
    expected |= {"geglu": expected["gelu"], "reglu": expected["relu"], "swiglu": expected["silu"]}
    assert set(expected) == set(PLAIN) | set(GATES)
    for name, value in expected.items():
        torch.testing.assert_close(activation_of(name)(x), value, msg=name)


def test_gates_are_those_of_the_spec():
    assert set(GATES) == set(GATED)


def test_unknown_name():
    with pytest.raises(ConfigError, match="unknown activation 'sine'"):
        activation_of("sine")
