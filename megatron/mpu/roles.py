# SPDX-License-Identifier: Apache-2.0
"""What modules say of their own parameters: which role they have, and how they start. Nothing is guessed from a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Protocol, runtime_checkable

from torch import Generator, Tensor, nn


class Role(Enum):
    """What a parameter is to its model.

    HIDDEN: a matrix from features to features; both sides grow with the width of the model
    EMBEDDING:  a matrix one side of which is a count of things: token embedding, vocabulary head, learned positions
    VECTOR: biases, scales of norms, and whatever else a module exempts from decay
    """

    HIDDEN = "hidden"
    EMBEDDING = "table"
    VECTOR = "vector"


@runtime_checkable
class StatesTables(Protocol):
    """A module that has tables."""

    def tables(self) -> tuple[str, ...]:
        """Local names of the matrices that are tables; a dot leads into a submodule."""


class Initial(Enum):
    """How a parameter starts, where its module names no method of its own.

    INPUT:  by `init_method`; what a matrix gets of which nothing is said
    OUTPUT: by `output_layer_init_method`: what writes into the residual stream
    KEEP:   as the constructor made it; what a vector gets of which nothing is said
    """

    INPUT = "input"
    OUTPUT = "output"
    KEEP = "keep"


Fill = Callable[[Tensor, Generator], None]
"""Writes a whole parameter, float32 and over all ranks, with random numbers of the generator only; each rank keeps its part."""

InitialValue = Initial | str | Fill
"""str: a method's name, as in `init_method`."""


@runtime_checkable
class StatesInitialValues(Protocol):
    """A module that says how parameters of its own start."""

    def initial_values(self) -> Mapping[str, InitialValue]:
        """Local names -> initial value; a dot leads into a submodule, of which the outer module has the last word."""


def initial_values_of(module: nn.Module) -> dict[int, InitialValue]:
    """What is said of a module tree's parameters, by the parameter's identity."""
    found: dict[int, InitialValue] = {}
    for part in module.modules():  # outer ones first
        if isinstance(part, StatesInitialValues):
            for name, value in part.initial_values().items():
                found.setdefault(id(part.get_parameter(name)), value)
    return found


def exempt_from_decay(module: nn.Module) -> set[int]:
    """Identities of the parameters that their modules exempt by `no_weight_decay() -> tuple[local parameter name, ...]`."""
    found: set[int] = set()
    for part in module.modules():
        names = getattr(part, "no_weight_decay", None)
        if callable(names):
            found.update(id(part.get_parameter(name)) for name in names())
    return found


def roles_of(module: nn.Module) -> dict[int, Role]:
    """Role of each parameter of a module tree, by the parameter's identity."""
    exempt = exempt_from_decay(module)
    tables: set[int] = set()
    for part in module.modules():
        if isinstance(part, StatesTables):
            tables.update(id(part.get_parameter(name)) for name in part.tables())

    def role(parameter: nn.Parameter) -> Role:
        if dimensions(parameter) <= 1 or id(parameter) in exempt:
            return Role.VECTOR
        return Role.EMBEDDING if id(parameter) in tables else Role.HIDDEN

    return {id(parameter): role(parameter) for parameter in module.parameters()}


def dimensions(parameter: nn.Parameter) -> int:
    """Number of dimensions of the whole parameter; under ZeRO-3 what is left here is an empty vector."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
