# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of any number of tensor parallel ranks as the weights of one rank of any other number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.formats.neox_files import read_weights, tensor_ranks
from megatron.checkpoint.formats.torch_file import SEQUENTIAL, LazyState, canonical_state
from megatron.errors import CheckpointError
from megatron.model.spec import ModelSpec
from megatron.model.transformer import Transformer
from megatron.mpu.groups import Group, Groups
from megatron.mpu.sharding import Replicated, Sharding, Summed, join, sharding_of, split

Shard = Mapping[str, Tensor]

MLP_OUTPUTS = ("mlp.linear2.weight", "mlp.dense_4h_to_h.weight", "mlp.w2.weight", "mlp.fc2_weight")
"""Ends of the name of the MLP's second matrix, in any dialect."""


def read_shards(folder: Path) -> list[Shard]:
    """The weights of every tensor rank by canonical name, in rank order."""
    return [read_weights(folder, rank) for rank in range(max(1, tensor_ranks(folder)))]


def width_over(shards: Sequence[Shard], ending: str | tuple[str, ...], dim: int) -> int | None:
    """Size along `dim`, summed over the ranks, of the first weight whose name ends so, or in one of these; None without one."""
    name = next((name for name in shards[0] if name.endswith(ending)), None)
    return None if name is None else sum(shard[name].shape[dim] for shard in shards)


def _same_names(shards: Sequence[Shard]) -> None:
    for rank, shard in enumerate(shards):
        if odd := set(shard) ^ set(shards[0]):
            what = f"tensor ranks 0 and {rank} hold different weights: {sorted(odd)[:6]}"
            raise CheckpointError(what, fix="check that all files were copied")


def shard_for(shards: Sequence[Shard], spec: ModelSpec, tp: Group, *, padding: bool = False) -> Shard:
    """The weights of this tensor rank, whatever number of ranks they were written by; cut on access.

    padding: rows of the vocabulary that only fill it up may be cut off, or added as zeros
    """
    return Spreading(spec, len(shards), tp, rows=width_over(shards, "word_embeddings.weight", 0) if padding else None).weights(shards)


class Spreading:
    """From the tensor ranks that wrote a checkpoint to one rank of another number of them.

    spec: the model that reads
    ranks: how many wrote
    rows: of the vocabulary, as it was written; None: as many as the model has
    """

    def __init__(self, spec: ModelSpec, ranks: int, tp: Group, *, rows: int | None = None) -> None:
        self._ranks = ranks
        self._tp = tp
        self._same = rows in (None, spec.vocab_size)
        self._from: Mapping[str, Sharding] = {}
        self._to: Mapping[str, Sharding] = {}
        self._rows: dict[str, int] = {}
        if not self._same or ranks != tp.size:
            written = with_vocabulary(spec, spec.vocab_size if rows is None else rows)
            self._from, self._to = shardings_of(written, ranks), shardings_of(spec, tp.size)
            before, after = shapes_of(written), shapes_of(spec)
            self._rows = {name: shape[0] for name, shape in after.items() if shape and shape != before[name]}

    def weights(self, shards: Sequence[Shard]) -> Shard:
        """This rank's weights."""
        return self._spread(shards, lambda name, table: table.get(name, Replicated()))

    def states(self, shards: Sequence[Shard], key: str) -> Shard:
        """This rank's part of an optimizer's state."""
        if key in SUMS_LIKE_WEIGHTS:
            return self.weights(shards)
        # Every share of a summed bias has the gradient of the whole bias, so what is made of gradients is that of the whole bias.
        return self._spread(shards, lambda name, table: _not_summed(table.get(name, Replicated())))

    def _spread(self, shards: Sequence[Shard], how: Callable[[str, Mapping[str, Sharding]], Sharding]) -> Shard:
        if self._same and self._ranks == self._tp.size:
            return shards[self._tp.rank]
        _same_names(shards)
        makers = {name: partial(self._one, shards, name, how(name, self._from), how(name, self._to)) for name in shards[0]}
        return LazyState(makers)

    def _one(self, shards: Sequence[Shard], name: str, before: Sharding, after: Sharding) -> Tensor:
        whole = join([shard[name] for shard in shards], before)
        if name in self._rows:
            whole = _filled(whole, self._rows[name])
        return split(whole, after, self._tp.rank, self._tp.size)


SUMS_LIKE_WEIGHTS = frozenset({"start", "grad_sum", "square_sum"})
"""States of an optimizer (MADGRAD) that hold the first weights, or gradients times the rate: of a share of a bias, a share."""


def _not_summed(how: Sharding) -> Sharding:
    return Replicated() if isinstance(how, Summed) else how


def _filled(tensor: Tensor, rows: int) -> Tensor:
    """Cut to `rows`, or filled up with zeros."""
    if tensor.shape[0] >= rows:
        return tensor[:rows]
    return torch.cat([tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])])


def with_vocabulary(spec: ModelSpec, rows: int) -> ModelSpec:
    """The same model with another number of rows in its vocabulary."""
    embedding, head = replace(spec.embedding, vocab_size=rows), replace(spec.head, vocab_size=rows)
    return replace(spec, embedding=embedding, head=head)


def shapes_of(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Whole shape of each stored tensor by canonical name."""
    return {name: tuple(tensor.shape) for name, tensor in canonical_state(Transformer(spec, device="meta")).items()}


def shardings_of(spec: ModelSpec, ranks: int) -> dict[str, Sharding]:
    """How each stored tensor, by canonical name, is spread over a number of tensor ranks."""
    tp = Group(rank=0, size=ranks, ranks=tuple(range(ranks)))
    table = sharding_of(Transformer(spec, groups=Groups(tp=tp), device="meta"))
    return {name.removeprefix(SEQUENTIAL): how for name, how in table.items()}
