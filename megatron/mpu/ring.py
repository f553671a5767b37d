# SPDX-License-Identifier: Apache-2.0
"""Tensors that travel round a group, one rank a step. Knows nothing of what they hold; has no gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.mpu.groups import Group


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
