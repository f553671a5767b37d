# SPDX-License-Identifier: Apache-2.0
"""How a tensor is spread over a group of ranks, said once beside the weight and read by everybody else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

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


@runtime_checkable
class StatesSharding(Protocol):
    """A module that says how its own parameters and stored tensors are split; what it leaves out is Replicated."""

    def sharding(self) -> dict[str, Sharding]:
        """Local name -> Sharding."""


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


def sharding_of(module: nn.Module) -> dict[str, Sharding]:
    """Sharding of every parameter and stored tensor (state dict name) of a module tree, on any device, also meta.

    What no module speaks for is Replicated.
    """
    table: dict[str, Sharding] = dict.fromkeys(module.state_dict(), Replicated())
    for prefix, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, StatesSharding):
            for name, how in child.sharding().items():
                table[f"{prefix}.{name}" if prefix else name] = how
    return table
