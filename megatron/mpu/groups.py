# SPDX-License-Identifier: Apache-2.0
"""Process groups as values, and the grid of ranks (pipe, data, context, tensor) that they are cut from.

`Groups.single()` is the ordinary case and needs no torch.distributed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from megatron.errors import ConfigError
from megatron.mpu.sharding import Axis, Sharding, Split

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

    def along(self, how: Sharding) -> Group:
        """The group that a tensor is spread over."""
        return self.ep if isinstance(how, Split) and how.axis is Axis.EXPERT else self.tp


AXES = ("pipe", "data", "context", "tensor")


class RankCoordinates(NamedTuple):
    """Coordinates of a rank."""

    pipe: int
    data: int
    context: int
    tensor: int


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A grid of pipe x data x context x tensor processes; tensor is innermost, so its ranks are neighbours on one node.

    >>> Topology(pipe=2, data=2, tensor=2).place(5)
    RankCoordinates(pipe=1, data=0, context=0, tensor=1)
    """

    pipe: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if self.size(axis) < 1:
                raise ConfigError(f"the {axis} axis has size {self.size(axis)}", fix="every axis of parallelism has size 1 or more")

    @classmethod
    def of_world(cls, world: int, *, pipe: int = 1, tensor: int = 1, context: int = 1) -> Topology:
        """The grid of `world` processes with as much data parallelism as is left.

        Raises ConfigError when pipe * tensor * context does not divide the world.
        """
        pipe, tensor, context = max(pipe, 1), max(tensor, 1), max(context, 1)
        replica = pipe * tensor * context
        if world % replica:
            raise ConfigError(
                f"{world} processes cannot be divided into {pipe} pipeline stages of {context} context and {tensor} tensor parallel ranks",
                where="pipe_parallel_size, context_parallel_size, model_parallel_size",
                fix=f"start a multiple of {replica} processes",
            )
        return cls(pipe=pipe, data=world // replica, context=context, tensor=tensor)

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.pipe * self.data * self.context * self.tensor

    def size(self, axis: str) -> int:
        """Length of an axis."""
        return {"pipe": self.pipe, "data": self.data, "context": self.context, "tensor": self.tensor}[axis]

    def rank(self, place: RankCoordinates) -> int:
        """Global rank at a place."""
        return ((place.pipe * self.data + place.data) * self.context + place.context) * self.tensor + place.tensor

    def place(self, rank: int) -> RankCoordinates:
        """RankCoordinates of a global rank."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipe, data = divmod(rest, self.data)
        return RankCoordinates(pipe, data, context, tensor)

    def members(self, axes: str | tuple[str, ...], rank: int) -> tuple[int, ...]:
        """Ranks that differ from `rank` only along `axes`, ascending: its group on that axis, or on the plane of several.

        >>> Topology(pipe=2, data=2, tensor=2).members("data", 5)
        (5, 7)
        """
        here = self.place(rank)
        free = (axes,) if isinstance(axes, str) else axes
        spans = [range(self.size(axis)) if axis in free else (at,) for axis, at in zip(AXES, here, strict=True)]
        return tuple(self.rank(RankCoordinates(*place)) for place in product(*spans))

    def groups(self, axes: str | tuple[str, ...]) -> list[tuple[int, ...]]:
        """All groups of an axis or of a plane of axes, ordered by their first rank. Every rank is in exactly one."""
        return sorted({self.members(axes, rank) for rank in range(self.world)})
