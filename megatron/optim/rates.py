# SPDX-License-Identifier: Apache-2.0
"""How learning rates follow the width of a model under muP. Knows no parameter and no optimizer object."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from megatron.errors import ConfigError
from megatron.mpu.roles import Role

Rates = Mapping[Role, float]

EVEN: Rates = MappingProxyType(dict.fromkeys(Role, 1.0))
"""One rate for all parameters."""

# The size of an update does not depend on that of the gradient.
BY_ENTRY = ("adam", "adamw", "cpu_adam", "cpu_torch_adam", "lion", "sm3")
BY_GRADIENT = ("sgd",)
BY_SPECTRUM = ("muon",)


def mup_rates(optimizer: str, width_mult: float) -> Rates:
    """What the rate of each role is multiplied by (Yang et al., arXiv 2203.03466, table 8).

    optimizer:  lower case name
    width_mult: hidden_size over the base width
    Adam and others with updates of fixed size per entry: hidden matrices learn at 1 / width_mult. SGD: vectors and tables at width_mult.
    Muon's updates have a fixed spectral norm, which is what muP asks of hidden matrices (Yang et al., arXiv 2310.17813, condition 1);
    the rest learns by Adam, at the plain rate.
    Raises ConfigError for an optimizer whose law is not known.
    """
    if optimizer in BY_ENTRY:
        return {**EVEN, Role.HIDDEN: 1.0 / width_mult}
    if optimizer in BY_GRADIENT:
        return {Role.HIDDEN: 1.0, Role.EMBEDDING: width_mult, Role.VECTOR: width_mult}
    if optimizer in BY_SPECTRUM:
        return EVEN
    raise ConfigError(
        f"there is no muP law for optimizer {optimizer!r}",
        where="optimizer.type, use_mup",
        fix=f"use one of: {', '.join((*BY_ENTRY, *BY_GRADIENT, *BY_SPECTRUM))}",
    )
