# SPDX-License-Identifier: Apache-2.0
"""Groups and shardings in the form in which DeepSpeed asks for them. Knows no model and no configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from megatron.mpu.groups import Group, Groups
from megatron.mpu.sharding import Split, sharding_of

SPLIT = "tensor_model_parallel"
"""Attribute by which DeepSpeed knows a parameter of which every tensor rank has a part of its own."""

TIED_AGAIN = "ds_pipe_replicated"
"""Attribute that DeepSpeed sets on a parameter that an earlier pipeline stage has, too."""


class Grid:
    """The `mpu` object that DeepSpeed's plain engine is given. Its pipeline engine makes one of its own.

    What DeepSpeed calls data parallel are the ranks with the same weights, those of context parallelism among them.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def get_model_parallel_rank(self) -> int:
        """Place among the ranks that together hold one copy of the weights."""
        return self._groups.tp.rank

    def get_model_parallel_world_size(self) -> int:
        """How many ranks hold one copy."""
        return self._groups.tp.size

    def get_model_parallel_group(self) -> Any:
        """The ranks that hold one copy."""
        return self._groups.tp.handle

    def get_tensor_model_parallel_rank(self) -> int:
        """Place in the tensor group."""
        return self._groups.tp.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        """Size of the tensor group."""
        return self._groups.tp.size

    def get_tensor_model_parallel_group(self) -> Any:
        """The tensor group."""
        return self._groups.tp.handle

    def get_tensor_model_parallel_src_rank(self) -> int:
        """Global rank of the first of the tensor group."""
        return self._groups.tp.ranks[0]

    def get_data_parallel_rank(self) -> int:
        """Place among the ranks with the same weights."""
        return self._groups.replicas.rank

    def get_data_parallel_world_size(self) -> int:
        """How many ranks have the same weights."""
        return self._groups.replicas.size

    def get_data_parallel_group(self) -> Any:
        """The ranks with the same weights."""
        return self._groups.replicas.handle

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their global ranks."""
        return list(self._groups.replicas.ranks)


def grid_of(groups: Groups) -> Grid | None:
    """The grid of a job; none where every rank has the same weights, which is what DeepSpeed expects untold."""
    return None if groups.tp.size == 1 else Grid(groups)


def mark_split(module: nn.Module) -> None:
    """Tell DeepSpeed, which sums norms over tensor ranks, which parameters are in parts there."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, how in sharding_of(module).items():
        if name in parameters:
            setattr(parameters[name], SPLIT, isinstance(how, Split))


def counted_here(tp: Group) -> Callable[[nn.Parameter], bool]:
    """Whether this rank's copy of a parameter enters a sum over all ranks with other weights; else another rank's does.

    A bias whose shares are summed (`Summed`) has the same gradient on every rank: that of the whole bias.
    """
    return lambda parameter: not getattr(parameter, TIED_AGAIN, False) and (tp.rank == 0 or getattr(parameter, SPLIT, False))


def entries_of(parameter: nn.Parameter) -> int:
    """Number of entries, also of a parameter that ZeRO-3 has partitioned."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
