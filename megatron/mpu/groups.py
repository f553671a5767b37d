# SPDX-License-Identifier: Apache-2.0
"""Process groups as values. `Groups.single()` is the ordinary case and needs no torch.distributed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron.mpu.sharding import Axis

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Group:
    """One axis of parallelism as seen by this rank.

    rank, size: this process within the group
    handle:     the torch process group; None without torch.distributed
    ranks:      global ranks of the members, in order
    sequence:   tensor group only: between split layers activations lie spread along the sequence (arXiv 2205.05198)
    """

    rank: int = 0
    size: int = 1
    handle: ProcessGroup | None = None
    ranks: tuple[int, ...] = (0,)
    sequence: bool = False

    @classmethod
    def single(cls) -> Group:
        """A group of this process alone."""
        return cls()


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups of this rank, one per axis.

    tp: share every weight matrix           pp: have the layers in stages
    dp: read different samples              cp: read different parts of the same samples' sequences
    ep: have different experts of a layer
    replicas: hold the same weights, so gradients and metrics are summed over it: dp and cp together
    world:    everybody
    """

    tp: Group = field(default_factory=Group.single)
    pp: Group = field(default_factory=Group.single)
    dp: Group = field(default_factory=Group.single)
    cp: Group = field(default_factory=Group.single)
    ep: Group = field(default_factory=Group.single)
    replicas: Group = field(default_factory=Group.single)
    world: Group = field(default_factory=Group.single)

    @classmethod
    def single(cls) -> Groups:
        """One process: every axis has size 1."""
        return cls()

    def along(self, axis: Axis) -> Group:
        """The group that tensors of an axis are cut over."""
        return self.tp if axis is Axis.TENSOR else self.ep
