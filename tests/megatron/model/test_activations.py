# SPDX-License-Identifier: Apache-2.0
"""Activations against their formulas."""

import math

import pytest
import torch

from megatron.errors import ConfigError
from megatron.model.mlp import GATES, PLAIN, activation_of
from megatron.model.spec import GATED


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
