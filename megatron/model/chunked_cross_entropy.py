# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy and other statistics of a vocabulary head, a block of rows at a time: the full logits never exist.

For one row with logits z = W x, label y and weight w: loss w (lse z - z_y), d x = w (W^T p - W_y), d W = w (p - e_y) x^T, where
p = softmax z. Row factors are applied to x and to products, never to the [rows, v] block, which is passed over as seldom as possible.
p - e_y is formed in float32 and sums over blocks are kept in float32: in 16 bits, a frequent token's gradient would be a long sum of ever
smaller changes, and p - e_y of a token predicted well the difference of two roundings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.errors import TrainingError
from megatron.mpu.comm import all_reduce
from megatron.mpu.groups import Group

Second = tuple[Tensor, Tensor]

# Elements of one block of logits. A CPU wants it near its last-level cache, a GPU wants large products.
CPU_BLOCK = 9_700_000
GPU_BLOCK = 256_000_000


def block_rows_for(vocab: int, device: torch.device, wanted: int = 0) -> int:
    """Rows per block for a slice of `vocab` entries; `wanted` > 0 is taken as it is."""
    if wanted > 0:
        return wanted
    elements = CPU_BLOCK if device.type == "cpu" else GPU_BLOCK
    return max(elements // vocab // 64 * 64, 64)


class _Softmax:
    """Blocks of logits turned into probabilities, in buffers that are made once."""

    def __init__(self, rows: int, weight: Tensor, tp: Group) -> None:
        self.weight = weight
        self.tp = tp
        self.logits = weight.new_empty(rows, weight.shape[0])
        exact = weight.dtype == torch.float64 or weight.dtype == torch.float32
        self.probs = torch.empty_like(self.logits, dtype=None if exact else torch.float32)

    def __call__(self, x: Tensor, rows: _Rows, at: slice | Tensor, *, slope: bool) -> tuple[Tensor, Tensor]:
        """x [rows, h], the block `at` of `rows` -> log p(target) [rows] fp32 and this rank's slice of softmax - e_target [rows, v / tp].

        The slice is a buffer that the next call overwrites; without `slope` it is not what it says.
        """
        count = x.shape[0]
        logits = torch.mm(x, self.weight.t(), out=self.logits[:count])
        picked = rows.picked(logits, at, self.tp)
        top = logits.amax(dim=1).float()
        soft = torch.softmax(logits, dim=1, dtype=self.probs.dtype, out=self.probs[:count])
        # The largest probability is exp(top - lse): at least 1 / v, so its logarithm is safe.
        lse = top - soft.amax(dim=1).log()
        whole = log_normaliser(lse, self.tp)
        if slope:
            if self.tp.size > 1:
                soft.mul_((lse - whole).exp()[:, None])  # softmax over this rank's slice -> over all
            rows.add_at_target(soft, at, soft.new_full((count,), -1.0))
            soft = soft if soft.dtype == logits.dtype else logits.copy_(soft)  # products run in the model's precision
        return picked - whole, soft


class _Gradients:
    """Accumulates d hidden and d weight of sum(factor * -log p) over blocks."""

    def __init__(self, x: Tensor, weight: Tensor, tp: Group, wants: tuple[bool, bool], *, several: bool) -> None:
        """several: more than one block comes"""
        self.tp = tp
        self.weight = weight
        self.x = torch.zeros_like(x) if wants[0] else None
        narrow = weight.dtype in (torch.float16, torch.bfloat16)
        self.w = torch.zeros_like(weight, dtype=torch.float32 if several and narrow else None) if wants[1] else None

    def add(self, rows: slice | Tensor, x: Tensor, slope: Tensor, factor: Tensor) -> None:
        """rows: where x [rows, h] lies in hidden; slope [rows, v / tp]: softmax - e_target; factor [rows] fp32."""
        factor = factor[:, None].to(x.dtype)
        if self.x is not None:
            self.x[rows] = (slope @ self.weight).mul_(factor)
        if self.w is None:
            return
        if self.w.dtype == x.dtype:
            self.w.addmm_(slope.t(), x * factor)
        else:
            self.w.add_(slope.t() @ (x * factor))

    def finish(self) -> None:
        """Complete the gradient of the replicated hidden; give both their tensors' dtype."""
        if self.x is not None:
            self.x = all_reduce(self.x, self.tp)
        if self.w is not None:
            self.w = self.w.to(self.weight.dtype)


def _active(weights: Tensor) -> Tensor | None:
    """Numbers of the rows with a weight; None = take all of them. On a GPU counting would make the CPU wait, so all are taken."""
    if weights.device.type != "cpu":
        return None
    rows = weights.nonzero()[:, 0]
    return None if rows.numel() == weights.numel() else rows


class _NLL(torch.autograd.Function):
    """sum(weights * nll); gradients are ready when forward returns."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, weights: Tensor, rows: _Rows, tp: Group, differentiable: bool
    ) -> tuple[Tensor, Tensor]:
        wants = ctx.needs_input_grad[:2] if differentiable else (False, False)
        x = hidden.reshape(-1, hidden.shape[-1])
        grads = _Gradients(x, weight, tp, wants, several=rows.count > rows.size)
        softmax = _Softmax(rows.size, weight, tp)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        every = torch.zeros(x.shape[0], dtype=torch.float32, device=x.device)
        for at in rows.blocks():
            x_at, factor = x[at], weights[at]
            logps, slope = softmax(x_at, rows, at, slope=any(wants))
            # 0 * inf is not 0: an unweighted row must not spoil the sum.
            total -= (logps * factor).masked_fill(factor == 0, 0.0).sum()
            every[at] = logps.masked_fill(factor == 0, 0.0)
            if any(wants):
                grads.add(at, x_at, slope, factor)
        grads.finish()
        ctx.hidden_shape = hidden.shape
        ctx.grads = grads
        every = every.view(hidden.shape[:-1])
        ctx.mark_non_differentiable(every)
        return total, every

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise TrainingError("the loss of the head was differentiated twice", fix="form the loss again, or use token_logps")
        # The scale (1 / tokens, loss scale) comes last: before it, 16-bit gradients could underflow.
        x = None if grads.x is None else grads.x.mul_(upstream[0]).view(ctx.hidden_shape)
        return x, None if grads.w is None else grads.w.mul_(upstream[0]), None, None, None, None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What one pass over the vocabulary gives of each row; shapes in `TokenStats`.

    second: (hidden [..., h'], weight [v / tp, h']) of the head that kl is measured from; it gets no gradient
    """

    logp: bool = False
    lse: bool = False
    entropy: bool = False
    top1: bool = False
    kl: KL | None = None
    second: Second | None = None


class KL(Enum):
    """Direction of the divergence between this head's p and a second, frozen head's q."""

    FORWARD = "sum q log(q / p)"  # as distillation has it
    REVERSE = "sum p log(p / q)"  # as policy gradients have it


class TokenStats(NamedTuple):
    """Float32 [...] each, with a gradient but for top1; None where not wanted, 0 where masked.

    logp: log p(target)    lse: log sum exp of the logits    entropy: -sum p log p    kl: divergence from the second head
    top1: most likely id, int64; the lowest of several
    """

    logp: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    kl: Tensor | None = None
    top1: Tensor | None = None


class _Block(NamedTuple):
    """One block of rows: log p of this rank's slice of the vocabulary, and what its statistics are made of. float32 [rows, v / tp]."""

    logp: Tensor
    lse: Tensor
    other: Tensor | None  # log q

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, other: Second | None, tp: Group) -> _Block:
        logp, lse = _log_softmax(x, weight, tp)
        return cls(logp, lse, None if other is None else _log_softmax(*other, tp)[0])

    def entropy(self, tp: Group) -> Tensor:
        return -all_reduce((self.logp.exp() * self.logp).sum(dim=1), tp)

    def kl(self, direction: KL, tp: Group) -> Tensor:
        assert self.other is not None
        away = self.logp - self.other
        terms = self.logp.exp() * away if direction is KL.REVERSE else self.other.exp() * -away
        return all_reduce(terms.sum(dim=1), tp)

    def top1(self, tp: Group) -> Tensor:
        best, index = self.logp.max(dim=1)
        index = index + tp.rank * self.logp.shape[1]
        level = all_reduce(best, tp, maximum=True)
        # The lowest id is the largest negative one.
        return -all_reduce(torch.where(best == level, -index, -(2**62)), tp, maximum=True)


def _log_softmax(x: Tensor, weight: Tensor, tp: Group) -> tuple[Tensor, Tensor]:
    """x [rows, h] -> this rank's slice of log softmax [rows, v / tp], and log sum exp [rows]; float32 or better."""
    logits = torch.mm(x, weight.t())
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse = log_normaliser(torch.logsumexp(logits, dim=1), tp)
    return logits.sub_(lse[:, None]), lse


class _Stats(torch.autograd.Function):
    """[4, rows] float32: logp, lse, entropy, kl (zeros where not wanted), and top1; backward computes the logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, rows: _Rows, wanted: Wanted, tp: Group) -> tuple[Tensor, Tensor]:
        x = hidden.reshape(-1, hidden.shape[-1])
        out = torch.zeros(4, x.shape[0], dtype=torch.float32, device=x.device)
        top1 = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        for at in rows.blocks():
            block = _Block.of(x[at], weight, rows.other(at), tp)
            if wanted.logp:
                out[0, at] = rows.picked(block.logp, at, tp)
            out[1, at] = block.lse.float()
            if wanted.entropy:
                out[2, at] = block.entropy(tp).float()
            if wanted.kl is not None:
                out[3, at] = block.kl(wanted.kl, tp).float()
            if wanted.top1:
                top1[at] = block.top1(tp)
        if rows.unmasked is not None:
            out, top1 = out * rows.unmasked, top1 * rows.unmasked
        ctx.save_for_backward(hidden, weight, out)
        ctx.rows, ctx.wanted, ctx.tp = rows, wanted, tp
        ctx.mark_non_differentiable(top1)
        return out, top1

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (hidden, weight, out), rows, wanted, tp = ctx.saved_tensors, ctx.rows, ctx.wanted, ctx.tp
        x = hidden.reshape(-1, hidden.shape[-1])
        factors = upstream[0] if rows.unmasked is None else upstream[0] * rows.unmasked
        grads = _Gradients(x, weight, tp, ctx.needs_input_grad[:2], several=rows.count > rows.size)
        for at in rows.blocks():
            block = _Block.of(x[at], weight, rows.other(at), tp)
            u_logp, u_lse, u_entropy, u_kl = (row[:, None] for row in factors[:, at])
            # Slopes are made at a size near 1 and scaled afterwards: in 16 bits, small ones would underflow.
            size = factors[:, at].abs().amax(dim=0)
            size = size.masked_fill(size == 0, 1.0)
            probs = block.logp.exp()
            share = u_lse - u_logp
            if wanted.entropy:
                share = share - u_entropy * (block.logp + out[2, at, None])
            if wanted.kl is KL.REVERSE and block.other is not None:
                share = share + u_kl * (block.logp - block.other - out[3, at, None])
            elif wanted.kl is KL.FORWARD:
                share = share + u_kl
            slope = probs.mul_(share / size[:, None])
            if wanted.kl is KL.FORWARD and block.other is not None:
                slope = slope.sub_(block.other.exp().mul_(u_kl / size[:, None]))
            if wanted.logp:
                rows.add_at_target(slope, at, u_logp[:, 0] / size)
            grads.add(at, x[at], slope.to(x.dtype), size)
        grads.finish()
        return None if grads.x is None else grads.x.view(hidden.shape), grads.w, None, None, None


class _Rows:
    """Which rows are computed, in which blocks, and what is asked of each.

    numbers:  of the rows that are computed; None = all
    size:     rows of a block; count: rows in all
    index, elsewhere: where each target lies in this rank's slice (`local_targets`); None = there are no targets
    unmasked: where all rows are computed, those that count
    second:   (hidden [rows, h], weight) of the second head
    """

    def __init__(
        self, weight: Tensor, count: int, tp: Group, block: int, targets: Tensor | None, mask: Tensor | None, second: Second | None = None
    ) -> None:
        """count: rows of hidden; targets, mask: [...] or None"""
        self.index: Tensor | None = None
        self.elsewhere: Tensor | None = None
        if targets is not None:
            self.index, self.elsewhere = local_targets(targets.reshape(-1), weight.shape[0], tp)
        self.numbers = None if mask is None else _active(mask.reshape(-1))
        self.count = count if self.numbers is None else self.numbers.numel()
        self.size = min(block_rows_for(weight.shape[0], weight.device, block), max(self.count, 1))
        self.unmasked = mask.reshape(-1) != 0 if mask is not None and self.numbers is None else None
        self.second = None if second is None else (second[0].detach().reshape(count, -1), second[1].detach())

    def blocks(self) -> Iterator[slice | Tensor]:
        """Where the rows of each block lie."""
        for start in range(0, self.count, self.size):
            at = slice(start, min(start + self.size, self.count))
            yield at if self.numbers is None else self.numbers[at]

    def other(self, at: slice | Tensor) -> Second | None:
        return None if self.second is None else (self.second[0][at], self.second[1])

    def picked(self, values: Tensor, at: slice | Tensor, tp: Group) -> Tensor:
        """Each row's value [rows] float32 at its target, of this rank's slices [rows, v / tp]."""
        assert self.index is not None
        found = values.gather(1, self.index[at][:, None])[:, 0].float()
        return found if self.elsewhere is None else all_reduce(found.masked_fill(self.elsewhere[at], 0.0), tp)

    def add_at_target(self, slope: Tensor, at: slice | Tensor, value: Tensor) -> None:
        """Add value [rows] to each row's target where it is in this rank's slice."""
        assert self.index is not None
        value = value if self.elsewhere is None else value.masked_fill(self.elsewhere[at], 0.0)
        slope.scatter_add_(1, self.index[at][:, None], value[:, None].to(slope.dtype))


def blockwise_nll(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, tp: Group, block: int = 0) -> tuple[Tensor, Tensor]:
    """sum(weights * -log softmax(hidden weight^T)[label]), a float32 scalar, and from the same pass log p(label) [...] without gradient.

    hidden [..., h] replicated over tp, weight [v / tp, h], labels [...] int64, weights [...] float (any sign; 0 = not computed).
    Gradients of hidden (complete) and weight are made on the way when wanted; then backward may run once.
    """
    weights = weights.detach().reshape(-1).float()
    rows = _Rows(weight, labels.numel(), tp, block, labels, weights)
    # Inside a Function's forward gradients are always off, so whether they are wanted is asked here.
    total, logps = _NLL.apply(hidden, weight, weights, rows, tp, torch.is_grad_enabled())
    return total, logps


def blockwise_stats(
    hidden: Tensor,
    weight: Tensor,
    wanted: Wanted,
    tp: Group,
    *,
    targets: Tensor | None = None,
    mask: Tensor | None = None,
    block: int = 0,
) -> TokenStats:
    """Statistics of softmax(hidden weight^T) in one pass over it; shapes as in `blockwise_nll`.

    targets: [...] int64, of logp
    mask:    [...]; rows where it is 0 are not computed
    """
    shape = hidden.shape[:-1]
    rows = _Rows(weight, shape.numel(), tp, block, targets, mask, wanted.second)
    out, top1 = _Stats.apply(hidden, weight, rows, wanted, tp)
    asked = (wanted.logp, wanted.lse, wanted.entropy, wanted.kl is not None)
    logp, lse, entropy, kl = (row.view(shape) if is_asked else None for row, is_asked in zip(out, asked, strict=True))
    return TokenStats(logp, lse, entropy, kl, top1.view(shape) if wanted.top1 else None)


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
