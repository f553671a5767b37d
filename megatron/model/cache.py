# SPDX-License-Identifier: Apache-2.0
"""Keys and values of earlier tokens, for decoding. An argument of a forward pass, never stored on a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.errors import NeoXError


class LayerCache:
    """One layer's keys and values; a row is one document and all rows have the same length."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """keys, values: room [b, max_len, g, d]"""
        self.keys = keys
        self.values = values
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of s new tokens, k and v [b, s, g, d] -> all of them so far, [b, t, g, d] views.

        Raises NeoXError when there is no room.
        """
        end = self.length + k.shape[1]
        if end > self.keys.shape[1]:
            raise NeoXError(
                f"the cache has room for {self.keys.shape[1]} tokens, not {end}", fix="allocate max_len for prompt and new tokens"
            )
        self.keys[:, self.length : end] = k
        self.values[:, self.length : end] = v
        self.length = end
        return self.keys[:, :end], self.values[:, :end]


class KVCache:
    """The caches of all attention layers of a model (or of a pipeline stage)."""

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers

    @classmethod
    def allocate(
        cls, num_layers: int, batch: int, max_len: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> KVCache:
        """Room for `max_len` tokens in each of `batch` rows; kv_heads are those on this rank."""
        room = torch.empty(num_layers, 2, batch, max_len, kv_heads, head_dim, dtype=dtype, device=device)
        return cls([LayerCache(keys, values) for keys, values in room])

    @property
    def length(self) -> int:
        """Tokens held by every layer (outside a forward pass)."""
        return self.layers[0].length

    def layer(self, index: int) -> LayerCache:
        """The cache of one layer."""
        return self.layers[index]

    def keep(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        for layer in self.layers:
            layer.length = min(layer.length, length)

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue what row rows[i] holds; rows [b] int64."""
        for layer in self.layers:
            layer.keys[:, : layer.length] = layer.keys[rows, : layer.length]
            layer.values[:, : layer.length] = layer.values[rows, : layer.length]
