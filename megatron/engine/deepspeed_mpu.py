# SPDX-License-Identifier: Apache-2.0
"""Groups and shardings in the form in which DeepSpeed asks for them, and models that ZeRO-3 partitions as they are built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
from torch import nn

from megatron import deepspeed_private as private
from megatron.model.init import Gather
from megatron.mpu.groups import Group, Groups
from megatron.mpu.sharding import Split, sharding_of


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

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

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
            setattr(parameters[name], private.SPLIT, isinstance(how, Split))


def counted_here(tp: Group) -> Callable[[nn.Parameter], bool]:
    """Whether this rank's copy of a parameter enters a sum over all ranks with other weights; else another rank's does.

    A bias whose shares are summed (`Summed`) has the same gradient on every rank: that of the whole bias.
    """
    return lambda parameter: not private.is_tied_again(parameter) and (tp.rank == 0 or getattr(parameter, private.SPLIT, False))


class Partitioning:
    """How a model is built under a DeepSpeed configuration: partitioned as it grows with ZeRO-3, else whole.

    config: DeepSpeed's, as a dict; it also says of what precision the parameters are
    """

    def __init__(self, config: Mapping[str, Any], groups: Groups) -> None:
        self.active = int(config["zero_optimization"].get("stage", 0)) == 3
        self._config = dict(config)
        self._groups = groups

    @property
    def gather(self) -> Gather | None:
        """Makes parameters whole while they are written to; every replica writes the same. None = they are whole."""
        return whole_while_written if self.active else None

    def building(self) -> AbstractContextManager[Any]:
        """The context to build the model in."""
        if not self.active:
            return nullcontext()
        context: AbstractContextManager[Any] = deepspeed.zero.Init(
            config_dict_or_path=self._config,
            data_parallel_group=self._groups.replicas.handle,
            mpu=grid_of(self._groups),
        )
        return context


def whole_while_written(parameters: Any) -> AbstractContextManager[Any]:
    """Partitioned parameters whole within; what was written is kept."""
    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
    return context
