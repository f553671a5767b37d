# SPDX-License-Identifier: Apache-2.0
"""Collectives without gradients: sums, flags and barriers over a Group. Nothing happens when the group is one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.mpu.groups import Group


def sum_over(tensor: Tensor, group: Group) -> Tensor:
    """Sum `tensor` over the group in place, on every rank; returns it."""
    if group.size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group.handle)
    return tensor


def any_rank(flag: bool, group: Group, device: torch.device) -> bool:
    """Whether any rank of the group says True; the same answer on all of them."""
    if group.size == 1:
        return flag
    votes = torch.tensor([int(flag)], dtype=torch.int32, device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=group.handle)
    return bool(votes.item())


def barrier(group: Group) -> None:
    """Wait until every rank of the group is here."""
    if group.size > 1:
        dist.barrier(group=group.handle)
