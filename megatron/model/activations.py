# SPDX-License-Identifier: Apache-2.0
"""Activation functions by name. Knows no layer and no width."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.errors import ConfigError

Activation = Callable[[Tensor], Tensor]


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415, sec. 2); [..] -> [..]."""
    return F.gelu(x, approximate="tanh")


def identity(x: Tensor) -> Tensor:
    """The gate of a bilinear layer; [..] -> [..]."""
    return x


PLAIN: Mapping[str, Activation] = MappingProxyType(
    {
        "gelu": F.gelu,
        "gelu_tanh": gelu_tanh,
        "relu": F.relu,
        "softsign": F.softsign,
        "swish": F.silu,
        "silu": F.silu,
        "mish": F.mish,  # arXiv 1908.08681
    }
)

# Gated linear units (Shazeer, arXiv 2002.05202): the function applied to the gate.
GATES: Mapping[str, Activation] = MappingProxyType(
    {
        "geglu": F.gelu,
        "reglu": F.relu,
        "swiglu": F.silu,
        "bilinear": identity,
        "glu": torch.sigmoid,
    }
)


def activation_of(name: str) -> Activation:
    """The function that `name` applies: to the whole projection, or, for a gated name, to the gate half.

    Raises ConfigError for an unknown name.
    """
    found = PLAIN.get(name) or GATES.get(name)
    if found is None:
        raise ConfigError(f"unknown activation '{name}'", where="activation", fix=f"one of {', '.join((*PLAIN, *GATES))}")
    return found
