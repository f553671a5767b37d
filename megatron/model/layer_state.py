# SPDX-License-Identifier: Apache-2.0
"""What flows from layer to layer, what decoding keeps of earlier tokens (the KV cache), and the contract of a block's two slots.

The slots are its mixer and its feed-forward. A new one is a frozen spec with `hidden_size`, a class that inherits Mixer or FeedForward,
and one line in `model/slots.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from megatron.errors import ConfigError, NeoXError
from megatron.mpu.context import ContextPlan
from megatron.mpu.groups import Groups


class LayerState(NamedTuple):
    """What a layer takes and gives. A tuple, so that the pipeline can send it.

    hidden      [b, s, h] activations (the first layer takes token ids [b, s] int64 in its place)
    segment_ids [b, s] int32 document number within the row; attention never crosses a change. All zero when documents are joined.
    aux         [] float32, the sum of what the layers so far add to the loss (balance losses); None = no layer has added anything

    A rank may have a part of the sequence's hidden states (sequence and context parallelism); segment_ids are always of whole rows.
    """

    hidden: Tensor
    segment_ids: Tensor
    aux: Tensor | None = None


SlotOutput = Tensor | tuple[Tensor, Tensor]
"""hidden [b, s, h], or (hidden, what is added to the loss, a float32 scalar that is equal on all ranks of tp)."""


class BlockSlot(nn.Module):
    """What mixers and feed-forwards have in common.

    `__init__(spec, *, tp, defer_reduce=False)`; a mixer also takes `context`. With defer_reduce the output is this rank's share of the
    sum over tp. Initial values and sharding are said by `initial_values()` and `sharding()` of the module or of its parts
    (mpu/sharding.py).
    adds_aux: forward gives (hidden, aux)
    """

    adds_aux: ClassVar[bool] = False

    @staticmethod
    def parameter_count(spec: Any) -> int:
        """Parameters of a slot of this spec over all ranks, without those that all layers share."""
        raise NotImplementedError

    @staticmethod
    def shared_parameter_count(spec: Any) -> int:
        """Parameters that all layers of this class share."""
        return 0

    @staticmethod
    def forward_flops(spec: Any, length: int) -> float:
        """Floating-point operations of the matrix products of one token's forward pass, in rows of `length` tokens."""
        raise NotImplementedError

    @staticmethod
    def check(spec: Any, *, stages: int) -> None:
        """Raise ConfigError for a spec that cannot be run over this many pipeline stages."""

    def share(self, first: Any) -> None:
        """Use what all layers of this class share from the first of them."""


class Mixer(BlockSlot):
    """The slot that lets tokens see each other: forward(hidden, segment_ids, cache) -> SlotOutput.

    `isolated` of the module says whether it looks at segment_ids; then PackedSequences may come in their place.
    """

    isolated: bool = False

    @staticmethod
    def context_plan(spec: Any, groups: Groups) -> ContextPlan | None:
        """How this mixer needs sequences to be spread over the context group; None = it works with any plan."""
        if groups.cp.size > 1:
            raise ConfigError(f"{type(spec).__name__} needs whole rows", where="context_parallel_size", fix="set context_parallel_size: 1")
        return None

    def allocate_cache(self, rows: int, max_len: int, dtype: torch.dtype, device: torch.device | str) -> LayerCache:
        """An empty cache for decoding `rows` rows of up to `max_len` tokens."""
        raise NotImplementedError

    def forward(self, hidden: Tensor, segment_ids: Any = None, cache: Any = None) -> SlotOutput:
        """hidden [b, s, h], segment_ids [b, s] of whole rows, or PackedSequences -> [b, s, h].

        A cache has the tokens before and takes these.
        """
        raise NotImplementedError


class FeedForward(BlockSlot):
    """The slot that works on each token by itself: forward(hidden) -> SlotOutput."""

    def forward(self, hidden: Tensor) -> SlotOutput:
        """hidden [b, s, h] -> [b, s, h]."""
        raise NotImplementedError


class LayerCache:
    """How many tokens of each row a layer has seen; a row is one document. What it keeps of them is said by the mixer's own class.

    lengths: tokens of each row, int64 [b], on the cache's device
    longest: the largest of them, known without asking the device
    even:    all rows have `longest` tokens
    """

    def __init__(self, rows: int, max_len: int, device: torch.device | str) -> None:
        self.max_len = max_len
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.longest = 0
        self.even = True

    def positions(self, count: int) -> Tensor:
        """Positions of the next `count` tokens of each row; int64 [b, count], or [1, count] where all rows are level."""
        ahead = torch.arange(self.longest, self.longest + count, device=self.lengths.device)[None]
        return ahead if self.even else self.lengths[:, None] + (ahead - self.longest)

    def advance(self, count: int) -> None:
        """Every row has `count` more tokens. Raises NeoXError when there is no room."""
        if self.longest + count > self.max_len:
            raise NeoXError(
                f"the cache has room for {self.max_len} tokens, not {self.longest + count}",
                fix="allocate max_len for prompt and new tokens",
            )
        self.lengths = self.lengths + count
        self.longest += count

    def keep(self, lengths: int | Tensor) -> None:
        """Forget all but the first `lengths` tokens, of all rows or int64 [b] of each."""
        if isinstance(lengths, int) and self.even:
            self.longest = min(self.longest, lengths)
            self.lengths = self.lengths.clamp(max=self.longest)
            return
        self.lengths = self.lengths.clamp(max=lengths)
        held = self.lengths.tolist()
        self.longest, self.even = max(held), len(set(held)) == 1


class AttentionCache(LayerCache):
    """Keys and values, each [b, max_len, g, d]."""

    def __init__(self, rows: int, max_len: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str) -> None:
        """kv_heads: those on this rank"""
        super().__init__(rows, max_len, device)
        # Zeros: of a shorter row, values that nobody has written are multiplied by 0.
        self.keys, self.values = torch.zeros(2, rows, max_len, kv_heads, head_dim, dtype=dtype, device=device)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of s new tokens, k and v [b, s, g, d] -> all of them so far, [b, t, g, d] views.

        Where rows have different lengths, t is the longest one's, and a shorter one's last keys mean nothing.
        Raises NeoXError when there is no room.
        """
        count, before = k.shape[1], self.longest
        where = self.positions(count)
        self.advance(count)
        if self.even:
            self.keys[:, before : self.longest], self.values[:, before : self.longest] = k, v
        else:
            rows = torch.arange(k.shape[0], device=k.device)[:, None]
            self.keys[rows, where], self.values[rows, where] = k, v
        return self.keys[:, : self.longest], self.values[:, : self.longest]


class ModelCache(list[LayerCache]):
    """The caches of all layers of a model (or of a pipeline stage), in order. Made by `Transformer.allocate_cache`."""

    def __init__(self, layers: Iterable[LayerCache]) -> None:
        super().__init__(layers)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row that every layer has seen (outside a forward pass); int64 [b]."""
        return self[0].lengths

    @property
    def longest(self) -> int:
        """The largest of `lengths`."""
        return self[0].longest

    def keep(self, lengths: int | Tensor) -> None:
        """Forget all but the first `lengths` tokens, of all rows or int64 [b] of each."""
        for layer in self:
            layer.keep(lengths)
