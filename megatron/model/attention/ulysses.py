# SPDX-License-Identifier: Apache-2.0
"""Ulysses attention (Jacobs et al., arXiv 2309.14509) through DeepSpeed: rows are exchanged for heads, then any back end serves.

The one file that names deepspeed.sequence.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from megatron.errors import BackendError
from megatron.model.attention.backends import Attend
from megatron.model.attention.inputs import AttentionInputs
from megatron.mpu.context import ContextPlan
from megatron.mpu.groups import Group


def attend(q: Tensor, k: Tensor, v: Tensor, view: AttentionInputs, plan: ContextPlan, inner: Attend) -> Tensor:
    """Whole rows of an n / cp-th of the heads on each rank, by the back end `inner`.

    q [b, s / cp, n, d], k and v [b, s / cp, g, d], view of whole rows and all n heads -> [b, s / cp, n, d]
    Every rank of plan.group calls this at the same time, also in the backward pass.
    Raises BackendError where torch.distributed was not started through DeepSpeed.
    """
    import deepspeed.comm
    from deepspeed.sequence.layer import DistributedAttention

    if not deepspeed.comm.is_initialized():
        raise BackendError(
            "Ulysses attention needs DeepSpeed's collectives, and deepspeed.init_distributed has not been called",
            where="context_parallel_size",
            fix="start the processes through train.py or deepy.py",
        )
    mine = partial(inner, view=own_heads(view, q.shape[2], plan.group))
    exchange = DistributedAttention(mine, plan.group.handle, scatter_idx=2, gather_idx=1)
    out: Tensor = exchange(q, k, v, batch_dim_idx=0)
    return out


def own_heads(view: AttentionInputs, heads: int, group: Group) -> AttentionInputs:
    """The view of this rank's part of `heads` heads: slopes, bias and seeds are per head, all else is common."""
    each = heads // group.size
    mine = slice(group.rank * each, (group.rank + 1) * each)
    whole = view.bias
    return replace(
        view,
        bias=None if whole is None else lambda queries, keys: whole(queries, keys)[mine],
        slopes=None if view.slopes is None else view.slopes[mine],
        seeds=view.seeds[mine],
    )
