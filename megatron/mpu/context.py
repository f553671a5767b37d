# SPDX-License-Identifier: Apache-2.0
"""Context parallelism: which rows of a sequence each rank of a group holds, and by which method attention reaches the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from megatron.errors import ConfigError
from megatron.mpu.groups import Group


class ContextKind(str, Enum):
    """How queries meet the keys of other ranks."""

    ULYSSES = "ulysses"  # heads change places with rows (Jacobs et al., arXiv 2309.14509)
    RING = "ring"  # keys and values travel (Liu et al., arXiv 2310.01889)


@dataclass(frozen=True)
class ContextPlan:
    """One choice for a whole model: a hidden state on a rank has `length / size` of a sequence's positions, in this order.

    Ulysses: rank after rank, equal slices. Ring: the sequence is cut into 2 * size chunks and a rank holds one from the front and
    its mirror image from the back, since late queries see more keys than early ones: so all ranks have as much to do.

    >>> [ContextPlan(Group(rank, 2), ContextKind.RING).rows(8).tolist() for rank in (0, 1)]
    [[0, 1, 6, 7], [2, 3, 4, 5]]
    >>> [ContextPlan(Group(rank, 2), ContextKind.ULYSSES).rows(8).tolist() for rank in (0, 1)]
    [[0, 1, 2, 3], [4, 5, 6, 7]]
    """

    group: Group = field(default_factory=Group.single)
    kind: ContextKind = ContextKind.ULYSSES

    @classmethod
    def choose(cls, group: Group, *, heads: int, kv_heads: int) -> ContextPlan:
        """Ulysses where a rank's heads and key heads (those left by tensor parallelism) divide by the group, else the ring."""
        divides = heads % group.size == 0 and kv_heads % group.size == 0
        return cls(group, ContextKind.ULYSSES if divides else ContextKind.RING)

    @property
    def size(self) -> int:
        """Ranks that share a sequence; 1 = no context parallelism."""
        return self.group.size

    @property
    def chunks(self) -> int:
        """Equal chunks that a sequence is cut into, so its length is a multiple of this."""
        return self.size * (2 if self.kind is ContextKind.RING and self.size > 1 else 1)

    def runs(self, length: int, rank: int | None = None) -> tuple[range, ...]:
        """Positions that a rank (None = this one) holds of a sequence of `length`, as ascending runs without a gap.

        Raises ConfigError when the length cannot be cut into equal chunks.
        """
        if length % self.chunks:
            raise ConfigError(
                f"a sequence of {length} tokens cannot be cut into {self.chunks} equal chunks for {self.kind.value} attention",
                where="seq_length, context_parallel_size",
                fix=f"choose a seq_length that is a multiple of {self.chunks}",
            )
        at, chunk = self.group.rank if rank is None else rank, length // self.chunks
        own = sorted({at, self.chunks - 1 - at}) if self.chunks > self.size else [at]
        return tuple(range(number * chunk, (number + 1) * chunk) for number in own)

    def rows(self, length: int, device: torch.device | str | None = None, rank: int | None = None) -> Tensor:
        """The same positions as an index; int64 [length / size], ascending."""
        return torch.cat([torch.arange(run.start, run.stop, device=device) for run in self.runs(length, rank)])

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a tensor with whole sequences along dim; x itself without context parallelism."""
        return x if self.size == 1 else x.index_select(dim, self.rows(x.shape[dim], x.device))
