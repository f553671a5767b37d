# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy and token log-probabilities on logits whose vocabulary is spread over a group. Changes no input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.mpu.comm import all_reduce
from megatron.mpu.groups import Group


def local_targets(targets: Tensor, size: int, group: Group) -> tuple[Tensor, Tensor | None]:
    """Where each target lies in this rank's slice of `size` entries.

    targets [...] int64 -> (index [...] within the slice, 0 where it lies elsewhere; mask [...] of those that lie
    elsewhere, None in a group of one)
    """
    if group.size == 1:
        return targets, None
    local = targets - group.rank * size
    elsewhere = (local < 0) | (local >= size)
    return local.masked_fill(elsewhere, 0), elsewhere


def log_normaliser(local_lse: Tensor, group: Group) -> Tensor:
    """log sum exp over the whole vocabulary from each rank's own; fp32 [...] -> [...]."""
    if group.size == 1:
        return local_lse
    top = all_reduce(local_lse, group, maximum=True)
    return top + all_reduce((local_lse - top).exp(), group).log()


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: Group) -> Tensor:
        exact = logits.float()
        index, elsewhere = local_targets(targets, logits.shape[-1], group)
        lse = log_normaliser(torch.logsumexp(exact, dim=-1), group)
        picked = exact.gather(-1, index[..., None])[..., 0]
        if elsewhere is not None:
            picked = all_reduce(picked.masked_fill(elsewhere, 0.0), group)
        ctx.save_for_backward(logits, index, elsewhere, lse)
        return picked - lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, index, elsewhere, lse = ctx.saved_tensors
        grad = grads[0][..., None].float()
        out = (logits.float() - lse[..., None]).exp_().mul_(-grad)
        hit = grad if elsewhere is None else grad.masked_fill(elsewhere[..., None], 0.0)
        out.scatter_add_(-1, index[..., None], hit)
        return out.to(logits.dtype), None, None


def token_logps(logits: Tensor, targets: Tensor, tp: Group) -> Tensor:
    """log p(target) in float32.

    logits [..., v / tp] (this rank's slice, in rank order), targets [...] int64 global ids -> [...] replicated.
    The gradient of this rank's slice of logits follows in the backward pass.
    """
    out: Tensor = _VocabParallelLogProbs.apply(logits, targets, tp)
    return out


def nll(logits: Tensor, targets: Tensor, tp: Group) -> Tensor:
    """-log p(target) in float32; shapes as in `token_logps`."""
    return -token_logps(logits, targets, tp)
