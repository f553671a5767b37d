# SPDX-License-Identifier: Apache-2.0
"""Process groups as values. `Groups.single()` is the ordinary case and needs no torch.distributed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Group:
    """One axis of parallelism as seen by this rank.

    rank, size: this process within the group
    handle:     the torch process group; None when size == 1
    """

    rank: int = 0
    size: int = 1
    handle: ProcessGroup | None = None
    ranks: tuple[int, ...] = (0,)

    @classmethod
    def single(cls) -> Group:
        """A group of this process alone."""
        return cls()


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The tensor, pipeline and data parallel groups of this rank, and the world."""

    tp: Group = field(default_factory=Group.single)
    pp: Group = field(default_factory=Group.single)
    dp: Group = field(default_factory=Group.single)
    world: Group = field(default_factory=Group.single)

    @classmethod
    def single(cls) -> Groups:
        """One process: every axis has size 1."""
        return cls()
