# SPDX-License-Identifier: Apache-2.0
"""Layout of the fused query-key-value projection, for the forward pass and for conversion alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.errors import ConfigError
from megatron.model.spec import AttentionSpec
from megatron.mpu.sharding import Split, local_size


@dataclass(frozen=True, kw_only=True)
class QKVLayout:
    """Order of the fused rows on one rank.

    FORMAT: as many key heads as query heads: head after head, each [q d rows, k d rows, v d rows].
    FORMAT: fewer (GQA, MQA): [all q; all k; all v] of the rank, heads in order; query head j uses key head j // (n / g).
    heads, kv_heads: on this rank
    """

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def interleaved(self) -> bool:
        """Whether rows go head by head."""
        return self.heads == self.kv_heads

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows of q, k and v."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim

    @property
    def parts(self) -> tuple[int, ...] | None:
        """Parts that tensor parallelism cuts each by itself; None = plain rows."""
        return None if self.interleaved else self.sizes

    @property
    def sharding(self) -> Split:
        """How the whole fused weight or bias is split (of a layout with tp_size 1)."""
        return Split(0, self.parts)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [b, s, (n + 2g) d] -> views q [b, s, n, d], k and v [b, s, g, d]."""
        if self.interleaved:
            q, k, v = qkv.unflatten(-1, (self.heads, 3, self.head_dim)).unbind(-2)
            return q, k, v
        q, k, v = qkv.split(self.sizes, dim=-1)
        shapes = [(self.heads, self.head_dim), (self.kv_heads, self.head_dim)]
        return q.unflatten(-1, shapes[0]), k.unflatten(-1, shapes[1]), v.unflatten(-1, shapes[1])

    def fuse(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Separate weights [n d, ...], [g d, ...], [g d, ...] (or biases) -> fused [(n + 2g) d, ...]."""
        if not self.interleaved:
            return torch.cat((q, k, v))
        heads = [part.unflatten(0, (self.heads, self.head_dim)) for part in (q, k, v)]
        return torch.stack(heads, dim=1).flatten(0, 2)  # [n, 3, d, ...]

    def unfuse(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The inverse of `fuse`."""
        if not self.interleaved:
            q, k, v = fused.split(self.sizes)
            return q, k, v
        q, k, v = fused.unflatten(0, (self.heads, 3, self.head_dim)).unbind(1)
        return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def layout(spec: AttentionSpec, tp_size: int = 1) -> QKVLayout:
    """The layout on each of tp_size ranks; with 1, that of whole tensors.

    Raises ConfigError when the heads cannot be divided.
    """
    if spec.num_heads % spec.num_kv_heads:
        raise ConfigError(
            f"num_kv_heads {spec.num_kv_heads} does not divide num_attention_heads {spec.num_heads}",
            where="num_kv_heads",
            fix="every key head serves the same number of query heads",
        )
    return QKVLayout(
        heads=local_size(spec.num_heads, tp_size, "num_attention_heads"),
        kv_heads=local_size(spec.num_kv_heads, tp_size, "num_kv_heads"),
        head_dim=spec.head_dim,
    )
