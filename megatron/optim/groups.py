# SPDX-License-Identifier: Apache-2.0
"""Parameters as optimizer groups: which decay, and at which share of the rate they learn (muP). Decided by role, never by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from megatron.errors import ConfigError
from megatron.mpu.sharding import Role, Summed, dimensions, exempt_from_decay, roles_of, sharding_of

Rates = Mapping[Role, float]

EVEN: Rates = MappingProxyType(dict.fromkeys(Role, 1.0))
"""One rate for all parameters."""

# The size of an update does not depend on that of the gradient.
BY_ENTRY = ("adam", "adamw", "cpu_adam", "cpu_torch_adam", "lion", "sm3")
BY_GRADIENT = ("sgd",)
BY_SPECTRUM = ("muon",)

MATRIX = "use_muon"
"""Key of a group, and for DeepSpeed attribute of a parameter: whether Muon updates it."""

LR_MULT = "lr_mult"
"""Key of a group whose rate is not the schedule's: what the schedule's is multiplied by."""


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters as optimizer groups: decayed first, then not decayed; empty groups are left out.

    Matrices decay, embeddings among them; vectors (biases, norm scales) do not. A module exempts further
    parameters of its own by defining `no_weight_decay() -> tuple[local parameter name, ...]`.
    Tied parameters count once. With weight_decay 0 there is one group.
    """
    exempt = exempt_from_decay(module)
    trained = _trained(module)
    decay = [p for p in trained if weight_decay != 0 and dimensions(p) > 1 and id(p) not in exempt]
    taken = set(map(id, decay))
    plain = [p for p in trained if id(p) not in taken]
    return _ordered([{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}])


def groups_by_role(module: nn.Module, weight_decay: float, rates: Rates) -> list[dict[str, Any]]:
    """The trainable parameters as one optimizer group per role: {params, weight_decay, lr_mult}.

    rates: what the rate of each role is multiplied by
    Rate times decay is the same for all matrices, so that a width changes how they learn but not how they are forgotten.
    """
    roles, trained = roles_of(module), _trained(module)
    return _ordered(
        {
            "params": [p for p in trained if roles[id(p)] is role],
            "weight_decay": 0.0 if role is Role.VECTOR else weight_decay / rates[role],
            LR_MULT: rates[role],
        }
        for role in Role
    )


def muon_groups(module: nn.Module, weight_decay: float, *, matrix_mult: float = 1.0, other_mult: float = 1.0) -> list[dict[str, Any]]:
    """The trainable parameters as groups {params, weight_decay, use_muon, lr_mult}: hidden matrices, tables, vectors.

    matrix_mult, other_mult: what the schedule's rate is multiplied by
    Hidden matrices with more than two dimensions go with the tables: Muon is defined on matrices.
    A fused weight (query_key_value, a gated linear1) counts as the one matrix it is stored as.
    """
    roles, trained = roles_of(module), _trained(module)
    matrices = [p for p in trained if roles[id(p)] is Role.HIDDEN and dimensions(p) == 2]
    vectors = [p for p in trained if roles[id(p)] is Role.VECTOR]
    taken = {id(p) for p in (*matrices, *vectors)}
    tables = [p for p in trained if id(p) not in taken]
    return _ordered(
        [
            {"params": matrices, "weight_decay": weight_decay, MATRIX: True, LR_MULT: matrix_mult},
            {"params": tables, "weight_decay": weight_decay, MATRIX: False, LR_MULT: other_mult},
            {"params": vectors, "weight_decay": 0.0, MATRIX: False, LR_MULT: other_mult},
        ]
    )


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _ordered(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without empty groups; those at the plain rate come first: the first group's rate is the one that is reported."""
    return sorted((group for group in groups if group["params"]), key=lambda group: bool(group.get(LR_MULT, 1.0) != 1.0))


def slow_shares(groups: list[dict[str, Any]], module: nn.Module, ranks: int) -> list[dict[str, Any]]:
    """`groups` with parameters of which each of `ranks` tensor ranks holds a share (Summed) in groups of their own, last, at 1 / ranks.

    Every share has the gradient of the sum that it is a part of. At the plain rate the sum would learn `ranks` times as fast as the one
    bias that it stands for; so it learns the same at any number of ranks.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    shares = {id(parameters[name]) for name, how in sharding_of(module).items() if isinstance(how, Summed) and name in parameters}
    if ranks == 1 or not shares:
        return groups
    parts = []
    for slow in (False, True):
        for group in groups:
            members = [p for p in group["params"] if (id(p) in shares) is slow]
            rate = {LR_MULT: group.get(LR_MULT, 1.0) / ranks} if slow else {}
            if members:
                parts.append({**group, "params": members, **rate})
    return parts


def rate_of(group: dict[str, Any], rate: float) -> float:
    """The rate of a group when the schedule says `rate`."""
    return rate * float(group.get(LR_MULT, 1.0))


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
