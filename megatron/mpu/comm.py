# SPDX-License-Identifier: Apache-2.0
"""Collectives with gradients over a Group. Each is the identity when the group is one process.

A tensor is either *replicated* (equal on all ranks, as is its gradient) or *split* (each rank has a slice).
In the table of a pair, the backward pass is the other's forward pass:

    copy            replicated -> input of split work     reduce          partial sums -> replicated
    scatter         replicated -> slice                   gather          slices -> replicated whole
    gather_sequence slices -> input of split work         reduce_scatter  partial sums -> slices
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.mpu.groups import AXES, Group, Groups, Topology

# ---- without gradients -------------------------------------------------------------------------------------------


def all_reduce(x: Tensor, group: Group, *, maximum: bool = False) -> Tensor:
    """Sum (or maximum) over the group, in a new tensor; x itself when alone."""
    if group.size == 1:
        return x
    assert group.handle is not None
    # The functional form gives its result as a value, which a recomputation can keep instead of asking the other ranks again.
    out = torch.ops._c10d_functional.all_reduce(x.contiguous(), "max" if maximum else "sum", group.handle.group_name)
    done: Tensor = torch.ops._c10d_functional.wait_tensor(out)
    return done


def all_gather(x: Tensor, group: Group, dim: int) -> Tensor:
    """Concatenation of every rank's x along dim."""
    if group.size == 1:
        return x
    pieces = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size)]
    dist.all_gather(pieces, x.contiguous(), group=group.handle)
    return torch.cat(pieces, dim)


def own_slice(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's equal part of x along dim."""
    return x if group.size == 1 else x.chunk(group.size, dim)[group.rank].contiguous()


def sum_slice(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's part of the sum over the group."""
    if group.size == 1:
        return x
    if x.device.type == "cpu":  # gloo has no reduce-scatter that serves every dtype
        return own_slice(all_reduce(x, group), group, dim)
    assert group.handle is not None
    pieces = torch.cat(x.chunk(group.size, dim))
    out = torch.ops._c10d_functional.reduce_scatter_tensor(pieces, "sum", group.size, group.handle.group_name)
    done: Tensor = torch.ops._c10d_functional.wait_tensor(out)
    return done


# ---- round a group, one rank a step ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shift:
    """A step under way. What is sent stays alive, and must not be written to, until `wait` returns."""

    sent: Tensor
    arriving: Tensor
    works: tuple[dist.Work, ...] = ()

    def wait(self) -> Tensor:
        """What the previous rank sent; shape as sent."""
        for work in self.works:
            work.wait()
        return self.arriving


def shift(x: Tensor, group: Group) -> Shift:
    """Start sending x to the next rank (the last one's next is the first) and receiving the previous rank's.

    Shapes and dtypes agree on all ranks. Several may be under way: each rank starts them in the same order.
    """
    if group.size == 1:
        return Shift(x, x)
    sent = x.contiguous()
    arriving = torch.empty_like(sent)
    after, before = group.ranks[(group.rank + 1) % group.size], group.ranks[group.rank - 1]
    # Neither half waits for the other, so it does not matter who comes first; NCCL joins the two into one launch.
    pair = [dist.P2POp(dist.isend, sent, after, group.handle), dist.P2POp(dist.irecv, arriving, before, group.handle)]
    return Shift(sent, arriving, tuple(dist.batch_isend_irecv(pair)))


# ---- with gradients ----------------------------------------------------------------------------------------------


def _same(x: Tensor, group: Group, dim: int) -> Tensor:
    return x.view_as(x)


def _sum(x: Tensor, group: Group, dim: int) -> Tensor:
    return all_reduce(x, group)


_Pass = Callable[[Tensor, Group, int], Tensor]
# name -> (forward pass, backward pass)
_PASSES: Mapping[str, tuple[_Pass, _Pass]] = MappingProxyType(
    {
        "copy": (_same, _sum),
        "reduce": (_sum, _same),
        "scatter": (own_slice, all_gather),
        "gather": (all_gather, own_slice),
        "gather_sequence": (all_gather, sum_slice),
        "reduce_scatter": (sum_slice, all_gather),
    }
)


class _Collective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, group: Group, dim: int) -> Tensor:
        ctx.name, ctx.group, ctx.dim = name, group, dim
        return _PASSES[name][0](x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _PASSES[ctx.name][1](grads[0], ctx.group, ctx.dim), None, None, None


def _apply(name: str, x: Tensor, group: Group, dim: int = 0) -> Tensor:
    if group.size == 1:
        return x
    out: Tensor = _Collective.apply(x, name, group, dim)
    return out


def copy(x: Tensor, group: Group) -> Tensor:
    """Replicated x enters split work; its gradient is summed over the group."""
    return _apply("copy", x, group)


def reduce(x: Tensor, group: Group) -> Tensor:
    """Partial sums of x -> their sum on every rank; the gradient passes as it is."""
    return _apply("reduce", x, group)


def scatter(x: Tensor, group: Group, dim: int = -1) -> Tensor:
    """Replicated x -> this rank's slice along dim; gradients are gathered."""
    return _apply("scatter", x, group, dim)


def gather(x: Tensor, group: Group, dim: int = -1) -> Tensor:
    """Slices along dim -> the whole on every rank; the gradient is sliced."""
    return _apply("gather", x, group, dim)


def gather_sequence(x: Tensor, group: Group, dim: int = 1) -> Tensor:
    """Slices along dim -> the whole as input of split work; gradients are summed and sliced (sequence parallelism)."""
    return _apply("gather_sequence", x, group, dim)


def reduce_scatter(x: Tensor, group: Group, dim: int = 1) -> Tensor:
    """Partial sums -> this rank's slice of the sum; gradients are gathered (sequence parallelism)."""
    return _apply("reduce_scatter", x, group, dim)


def sum_statistic(x: Tensor, group: Group) -> Tensor:
    """Sum over the group of a statistic that every rank then uses on its own slice; its gradient is summed too."""
    return copy(reduce(x, group), group)


# ---- where split layers begin and end ----------------------------------------------------------------------------


def copy_to_region(x: Tensor, tp: Group) -> Tensor:
    """Input of a layer that is split over tp: x [b, s, ...], or where the sequence is spread its part of it -> [b, s, ...]."""
    return gather_sequence(x, tp) if tp.sequence else copy(x, tp)


def reduce_from_region(x: Tensor, tp: Group) -> Tensor:
    """Partial sums of a layer that is split over tp, [b, s, ...] -> their sum, or where the sequence is spread this rank's part of it."""
    return reduce_scatter(x, tp) if tp.sequence else reduce(x, tp)


def sum_weight_grad(weight: Tensor, tp: Group) -> Tensor:
    """A replicated weight that works on this rank's part of the sequence: its gradient is summed over tp."""
    return copy(weight, tp) if tp.sequence else weight


def scatter_to_region(x: Tensor, tp: Group) -> Tensor:
    """What is equal on all ranks of tp, [b, s, ...] -> the part this rank works on, [b, s / tp, ...] where the sequence is spread."""
    return scatter(x, tp, 1) if tp.sequence else x


def gather_from_region(x: Tensor, tp: Group) -> Tensor:
    """The inverse of `scatter_to_region`; what follows is the same work on every rank."""
    return gather(x, tp, 1) if tp.sequence else x


# ---- process groups ----------------------------------------------------------------------------------------------


def open_groups(topology: Topology, rank: int, *, sequence: bool = False) -> Groups:
    """Create every group of the grid (a collective call of all ranks) and return those of `rank`.

    sequence: tensor parallel ranks spread activations along the sequence between their split layers
    torch.distributed must be initialised unless the world is one process.
    """

    several = topology.world > 1
    # Groups of one have a handle, too: to torch and DeepSpeed, none would mean everybody.
    alone = dist.new_group([rank], use_local_synchronization=True) if several else None

    def along(*axes: str) -> Group:
        mine = topology.members(axes, rank)
        handle = alone
        if len(mine) == topology.world:
            handle = dist.group.WORLD if several else None
        elif len(mine) > 1:
            made = {ranks: dist.new_group(list(ranks)) for ranks in topology.groups(axes)}
            handle = made[mine]
        return Group(rank=mine.index(rank), size=len(mine), handle=handle, ranks=mine)

    tp = along("tensor")
    return Groups(
        tp=replace(tp, sequence=sequence and tp.size > 1),
        pp=along("pipe"),
        dp=along("data"),
        cp=along("context"),
        replicas=along("data", "context"),
        world=along(*AXES),
    )
