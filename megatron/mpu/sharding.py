# SPDX-License-Identifier: Apache-2.0
"""What modules say of their own parameters, once beside the weight: how they are split over ranks, their role, and how they start.

A module has any of these methods; names are local, and a dot leads into a submodule:

    sharding()        -> {name: Sharding}, also of stored tensors; what is left out is Replicated
    tables()          -> names of the matrices that are tables (`Role.EMBEDDING`)
    no_weight_decay() -> names of the parameters that do not decay
    initial_values()  -> {name: InitialValue}; of a submodule's parameter the outer module has the last word
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Generator, Tensor, nn

from megatron.errors import ConfigError


class Axis(Enum):
    """The group of ranks that a tensor is cut over (`Groups.along`)."""

    TENSOR = "tensor"
    EXPERT = "expert"


@dataclass(frozen=True)
class Replicated:
    """Equal on every rank."""


@dataclass(frozen=True)
class Split:
    """Cut along `dim` into equal slices, rank after rank.

    parts: global sizes of parts that are cut each by itself: a rank holds [its slice of part 0; of part 1; ...]
    axis:  over which ranks

    >>> split(torch.arange(6), Split(0, parts=(4, 2)), rank=1, size=2)
    tensor([2, 3, 5])
    """

    dim: int
    parts: tuple[int, ...] | None = None
    axis: Axis = Axis.TENSOR


@dataclass(frozen=True)
class Summed:
    """The effective tensor is the sum over ranks. FORMAT: a checkpoint of tp ranks holds a tp-th on each."""


Sharding = Replicated | Split | Summed


def local_size(size: int, ranks: int, what: str) -> int:
    """size / ranks. Raises ConfigError when that is not whole."""
    if size % ranks:
        raise ConfigError(
            f"{what} {size} cannot be divided over {ranks} tensor parallel ranks",
            where=f"{what}, model_parallel_size",
            fix=f"choose a model_parallel_size that divides {size}",
        )
    return size // ranks


def split(tensor: Tensor, how: Sharding, rank: int, size: int) -> Tensor:
    """The slice of a whole tensor that `rank` of `size` holds (a view where possible).

    Raises ConfigError when a part cannot be divided.
    """
    if size == 1 or isinstance(how, Replicated):
        return tensor
    if isinstance(how, Summed):
        return tensor / size
    parts = how.parts or (tensor.shape[how.dim],)
    slices = []
    for part in tensor.split(list(parts), how.dim):
        step = local_size(part.shape[how.dim], size, "a dimension of")
        slices.append(part.narrow(how.dim, rank * step, step))
    return slices[0] if len(slices) == 1 else torch.cat(slices, how.dim)


def join(shards: Sequence[Tensor], how: Sharding) -> Tensor:
    """The whole tensor from every rank's slice, in rank order; the inverse of `split`."""
    if len(shards) == 1 or isinstance(how, Replicated):
        return shards[0]
    if isinstance(how, Summed):
        return torch.stack([shard.double() for shard in shards]).sum(0).to(shards[0].dtype)
    if how.parts is None:
        return torch.cat(list(shards), how.dim)
    sizes = [part // len(shards) for part in how.parts]
    pieces = [shard.split(sizes, how.dim) for shard in shards]
    return torch.cat([piece[index] for index in range(len(sizes)) for piece in pieces], how.dim)


class Role(Enum):
    """What a parameter is to its model.

    HIDDEN: a matrix from features to features; both sides grow with the width of the model
    EMBEDDING:  a matrix one side of which is a count of things: token embedding, vocabulary head, learned positions
    VECTOR: biases, scales of norms, and whatever else a module exempts from decay
    """

    HIDDEN = "hidden"
    EMBEDDING = "table"
    VECTOR = "vector"


class Initial(Enum):
    """How a parameter starts, where its module names no method of its own.

    INPUT:  by `init_method`; what a matrix gets of which nothing is said
    OUTPUT: by `output_layer_init_method`: what writes into the residual stream
    KEEP:   as the constructor made it; what a vector gets of which nothing is said
    """

    INPUT = "input"
    OUTPUT = "output"
    KEEP = "keep"


Fill = Callable[[Tensor, Generator], object]
"""Writes a whole parameter, float32 and over all ranks, with random numbers of the generator only; each rank keeps its part."""

InitialValue = Initial | str | Fill
"""str: a method's name, as in `init_method`."""


def stated(module: nn.Module, method: str) -> Iterator[tuple[str, nn.Module, Any]]:
    """(prefix, part, what it says) for each part of a module tree that has this method, outer ones first."""
    for prefix, part in module.named_modules(remove_duplicate=False):
        if callable(ask := getattr(part, method, None)):
            yield f"{prefix}." if prefix else "", part, ask()


def _named(module: nn.Module, method: str) -> set[int]:
    """Identities of the parameters that the parts of a module tree name by this method."""
    return {id(part.get_parameter(name)) for _, part, names in stated(module, method) for name in names}


def sharding_of(module: nn.Module) -> dict[str, Sharding]:
    """Sharding of every parameter and stored tensor (state dict name) of a module tree, on any device, also meta."""
    table: dict[str, Sharding] = dict.fromkeys(module.state_dict(), Replicated())
    for prefix, _, said in stated(module, "sharding"):
        table.update({prefix + name: how for name, how in said.items()})
    return table


def initial_values_of(module: nn.Module) -> dict[int, InitialValue]:
    """How each parameter of a module tree starts, by the parameter's identity."""
    found: dict[int, InitialValue] = {}
    for _, part, said in stated(module, "initial_values"):
        for name, value in said.items():
            found.setdefault(id(part.get_parameter(name)), value)
    for parameter in module.parameters():
        found.setdefault(id(parameter), Initial.INPUT if dimensions(parameter) > 1 else Initial.KEEP)
    return found


def exempt_from_decay(module: nn.Module) -> set[int]:
    """Identities of the parameters that their modules exempt from weight decay."""
    return _named(module, "no_weight_decay")


def roles_of(module: nn.Module) -> dict[int, Role]:
    """Role of each parameter of a module tree, by the parameter's identity."""
    exempt, tables = exempt_from_decay(module), _named(module, "tables")

    def role(parameter: nn.Parameter) -> Role:
        if dimensions(parameter) <= 1 or id(parameter) in exempt:
            return Role.VECTOR
        return Role.EMBEDDING if id(parameter) in tables else Role.HIDDEN

    return {id(parameter): role(parameter) for parameter in module.parameters()}


def dimensions(parameter: nn.Parameter) -> int:
    """Number of dimensions of the whole parameter; under ZeRO-3 what is left here is an empty vector."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
