# SPDX-License-Identifier: Apache-2.0
"""What decoding keeps of earlier tokens. An argument of a forward pass, never stored on a layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron.errors import NeoXError


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
