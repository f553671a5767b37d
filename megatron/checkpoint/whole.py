# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of any number of tensor parallel ranks as the whole tensors of one process. Knows no optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from megatron.checkpoint.neox_store import read_weights, tensor_ranks
from megatron.errors import CheckpointError
from megatron.model.spec import ModelSpec
from megatron.model.transformer import Transformer
from megatron.mpu.groups import Group, Groups
from megatron.mpu.sharding import Replicated, join, sharding_of

Shard = Mapping[str, Tensor]


def read_shards(folder: Path) -> list[Shard]:
    """The weights of every tensor rank by canonical name, in rank order."""
    return [read_weights(folder, rank) for rank in range(max(1, tensor_ranks(folder)))]


def width_over(shards: Sequence[Shard], ending: str, dim: int) -> int | None:
    """Size along `dim`, summed over the ranks, of the first weight whose name ends so; None where there is none."""
    name = next((name for name in shards[0] if name.endswith(ending)), None)
    return None if name is None else sum(shard[name].shape[dim] for shard in shards)


def join_shards(shards: Sequence[Shard], spec: ModelSpec) -> Shard:
    """Whole tensors from the shards, joined as the model itself says they are split.

    Raises CheckpointError when the ranks do not hold the same names.
    """
    if len(shards) == 1:
        return shards[0]
    for rank, shard in enumerate(shards):
        if odd := set(shard) ^ set(shards[0]):
            raise CheckpointError(
                f"tensor ranks 0 and {rank} hold different weights: {sorted(odd)[:6]}", mend="check that all files were copied"
            )
    tp = Group(rank=0, size=len(shards), ranks=tuple(range(len(shards))))
    table = sharding_of(Transformer(spec, groups=Groups(tp=tp), device="meta"))
    return {name: join([shard[name] for shard in shards], table.get(f"sequential.{name}", Replicated())) for name in shards[0]}
