# SPDX-License-Identifier: Apache-2.0
"""How tensors of another naming become ours and back.

`pack` takes the other side's tensors to ours, `unpack` ours to theirs; both take and give lists, so that ops chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron.errors import CheckpointError
from megatron.model.attention.qkv import layout
from megatron.model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class OpContext:
    """Where an op works.

    layer:      index of the block; 0 outside of blocks
    vocab_size: rows of the other side's vocabulary matrices
    """

    spec: ModelSpec
    layer: int
    vocab_size: int


class Op(Protocol):
    """A change of layout in both directions: unpack(pack(x)) == x."""

    def pack(self, parts: list[Tensor], at: OpContext) -> list[Tensor]:
        """The other side's tensors -> ours."""

    def unpack(self, parts: list[Tensor], at: OpContext) -> list[Tensor]:
        """Our tensors -> the other side's."""


@dataclass(frozen=True)
class Transpose:
    """Matrices stored [in, out] on the other side (GPT-2's Conv1D). Vectors stay."""

    def pack(self, parts: list[Tensor], at: OpContext) -> list[Tensor]:
        """[in, out] <-> [out, in]."""
        return [part.t().contiguous() for part in parts]

    unpack = pack


@dataclass(frozen=True)
class Concat:
    """`count` tensors of the other side are equal parts of one of ours, in order, along `dim`."""

    dim: int
    count: int

    def pack(self, parts: list[Tensor], at: OpContext) -> list[Tensor]:
        """Join."""
        return [torch.cat(parts, self.dim)]

    def unpack(self, parts: list[Tensor], at: OpContext) -> list[Tensor]:
        """Cut."""
        return [piece.contiguous() for piece in parts[0].chunk(self.count, self.dim)]


class Chunk(Concat):
    """One tensor of the other side is `count` equal parts along `dim`: the opposite of Concat."""

    pack, unpack = Concat.unpack, Concat.pack


@dataclass(frozen=True)
class FuseQKV:
    """Query, key and value projections (weights or biases) <-> our fused one, in the layout the forward pass reads."""

    def pack(self, parts: list[Tensor], at: OpContext) -> list[Tensor]:
        """[q, k, v] -> [fused]."""
        query, key, value = parts
        return [layout(at.spec.blocks[at.layer].attention).fuse(query, key, value)]

    def unpack(self, parts: list[Tensor], at: OpContext) -> list[Tensor]:
        """[fused] -> [q, k, v]."""
        return [part.contiguous() for part in layout(at.spec.blocks[at.layer].attention).unfuse(parts[0])]


@dataclass(frozen=True)
class GroupQKV:
    """One tensor with the query heads of a key head, that key head and its value head together <-> our fused one."""

    def pack(self, parts: list[Tensor], at: OpContext) -> list[Tensor]:
        """[(g (n / g + 2) d), ...] -> [fused]."""
        attention = at.spec.blocks[at.layer].attention
        shared = attention.num_heads // attention.num_kv_heads
        query, key, value = parts[0].unflatten(0, (attention.num_kv_heads, shared + 2, attention.head_dim)).split((shared, 1, 1), 1)
        return [layout(attention).fuse(query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2))]

    def unpack(self, parts: list[Tensor], at: OpContext) -> list[Tensor]:
        """[fused] -> [(g (n / g + 2) d), ...]."""
        attention = at.spec.blocks[at.layer].attention
        groups = (attention.num_kv_heads, -1, attention.head_dim)
        return [torch.cat([part.unflatten(0, groups) for part in layout(attention).unfuse(parts[0])], 1).flatten(0, 2)]


@dataclass(frozen=True)
class RotaryPairs:
    """Queries and keys whose rotated pairs are neighbours <-> halves of a head apart, as ours. What comes after them stays."""

    def pack(self, parts: list[Tensor], at: OpContext) -> list[Tensor]:
        """(0, 1), (2, 3), ... -> (0, d/2), (1, d/2 + 1), ..."""
        half = at.spec.blocks[at.layer].attention.head_dim // 2
        return [part.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2) for part in parts[:2]] + parts[2:]

    def unpack(self, parts: list[Tensor], at: OpContext) -> list[Tensor]:
        """The inverse."""
        half = at.spec.blocks[at.layer].attention.head_dim // 2
        return [part.unflatten(0, (-1, 2, half)).transpose(1, 2).flatten(0, 2) for part in parts[:2]] + parts[2:]


@dataclass(frozen=True)
class GateFirst:
    """A gated MLP's first projection is [gate; value] on the other side, [value; gate] on ours. Ungated ones are the same."""

    def pack(self, parts: list[Tensor], at: OpContext) -> list[Tensor]:
        """Exchange the halves."""
        return [torch.cat(parts[0].chunk(2)[::-1])] if at.spec.blocks[at.layer].mlp.gated else parts

    unpack = pack


@dataclass(frozen=True)
class PadVocab:
    """Vocabulary matrices: ours have rows up to the padded size, of zeros."""

    def pack(self, parts: list[Tensor], at: OpContext) -> list[Tensor]:
        """Add rows."""
        weight, rows = parts[0], at.spec.vocab_size
        if weight.shape[0] > rows:
            what = f"a vocabulary of {weight.shape[0]} rows does not fit the model's {rows}"
            raise CheckpointError(what, where="padded_vocab_size", fix="raise padded_vocab_size (or use the tokenizer of the checkpoint)")
        return [torch.cat((weight, weight.new_zeros(rows - weight.shape[0], *weight.shape[1:])))] if weight.shape[0] < rows else [weight]

    def unpack(self, parts: list[Tensor], at: OpContext) -> list[Tensor]:
        """Cut them off."""
        return [parts[0][: at.vocab_size]]


@dataclass(frozen=True)
class Chain:
    """Several ops, packing from first to last."""

    ops: tuple[Op, ...]

    def pack(self, parts: list[Tensor], at: OpContext) -> list[Tensor]:
        """First to last."""
        for op in self.ops:
            parts = op.pack(parts, at)
        return parts

    def unpack(self, parts: list[Tensor], at: OpContext) -> list[Tensor]:
        """Last to first."""
        for op in reversed(self.ops):
            parts = op.unpack(parts, at)
        return parts


SAME = Chain(())
"""No change."""
