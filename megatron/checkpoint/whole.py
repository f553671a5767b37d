# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of any number of tensor parallel ranks as the weights of one rank of any other number. Knows no optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from megatron.checkpoint.neox_store import read_weights, tensor_ranks
from megatron.checkpoint.state import SEQUENTIAL, LazyState
from megatron.errors import CheckpointError
from megatron.model.spec import ModelSpec
from megatron.model.transformer import Transformer
from megatron.mpu.groups import Group, Groups
from megatron.mpu.sharding import Replicated, Sharding, join, sharding_of, split

Shard = Mapping[str, Tensor]


def read_shards(folder: Path) -> list[Shard]:
    """The weights of every tensor rank by canonical name, in rank order."""
    return [read_weights(folder, rank) for rank in range(max(1, tensor_ranks(folder)))]


def width_over(shards: Sequence[Shard], ending: str, dim: int) -> int | None:
    """Size along `dim`, summed over the ranks, of the first weight whose name ends so; None where there is none."""
    name = next((name for name in shards[0] if name.endswith(ending)), None)
    return None if name is None else sum(shard[name].shape[dim] for shard in shards)


def join_shards(shards: Sequence[Shard], spec: ModelSpec) -> Shard:
    """Whole tensors from the shards, joined on access as the model itself says they are split.

    Raises CheckpointError when the ranks do not hold the same names.
    """
    if len(shards) == 1:
        return shards[0]
    for rank, shard in enumerate(shards):
        if odd := set(shard) ^ set(shards[0]):
            raise CheckpointError(
                f"tensor ranks 0 and {rank} hold different weights: {sorted(odd)[:6]}", mend="check that all files were copied"
            )
    table = shardings_of(spec, len(shards))
    return LazyState({name: partial(_joined, shards, name, table.get(name, Replicated())) for name in shards[0]})


def _joined(shards: Sequence[Shard], name: str, how: Sharding) -> Tensor:
    return join([shard[name] for shard in shards], how)


def shard_for(shards: Sequence[Shard], spec: ModelSpec, tp: Group) -> Shard:
    """The weights of this tensor rank, whatever number of ranks they were written by; cut on access."""
    if len(shards) == tp.size:
        return shards[tp.rank]
    whole = join_shards(shards, spec)
    if tp.size == 1:
        return whole
    table = shardings_of(spec, tp.size)
    return LazyState({name: partial(_cut, whole, name, table.get(name, Replicated()), tp) for name in whole})


def _cut(whole: Shard, name: str, how: Sharding, tp: Group) -> Tensor:
    return split(whole[name], how, tp.rank, tp.size)


def shardings_of(spec: ModelSpec, ranks: int) -> dict[str, Sharding]:
    """How each stored tensor, by canonical name, is spread over a number of tensor ranks."""
    tp = Group(rank=0, size=ranks, ranks=tuple(range(ranks)))
    table = sharding_of(Transformer(spec, groups=Groups(tp=tp), device="meta"))
    return {name.removeprefix(SEQUENTIAL): how for name, how in table.items()}
