# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of a vocabulary head, a block of rows at a time: the full logits never exist. Knows no model and no objective.

For one row with logits z = W x, label y and weight w: loss w (lse z - z_y), d x = w (W^T p - W_y), d W = w (p - e_y) x^T, where
p = softmax z. Row factors are applied to x and to products, never to the [rows, v] block, which is passed over as seldom as possible.
p - e_y is formed in float32 and sums over blocks are kept in float32: in 16 bits, a frequent token's gradient would be a long sum of ever
smaller changes, and p - e_y of a token foretold well the difference of two roundings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron.errors import TrainingError
from megatron.mpu.comm import all_reduce
from megatron.mpu.cross_entropy import local_targets, log_normaliser
from megatron.mpu.groups import Group

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

    def __call__(self, x: Tensor, index: Tensor, elsewhere: Tensor | None, *, slope: bool) -> tuple[Tensor, Tensor]:
        """x [rows, h], index [rows] -> log p(target) [rows] fp32 and this rank's slice of softmax - e_target [rows, v / tp].

        The slice is a buffer that the next call overwrites; without `slope` it is not what it says.
        """
        count = x.shape[0]
        logits = torch.mm(x, self.weight.t(), out=self.logits[:count])
        picked = logits.gather(1, index[:, None])[:, 0].float()
        top = logits.amax(dim=1).float()
        soft = torch.softmax(logits, dim=1, dtype=self.probs.dtype, out=self.probs[:count])
        # The largest probability is exp(top - lse): at least 1 / v, so its logarithm is safe.
        lse = top - soft.amax(dim=1).log()
        whole = log_normaliser(lse, self.tp)
        if elsewhere is not None:
            picked = all_reduce(picked.masked_fill(elsewhere, 0.0), self.tp)
        if slope:
            soft = self._minus_target(soft, (lse - whole).exp(), index, elsewhere)
            soft = soft if soft.dtype == logits.dtype else logits.copy_(soft)  # products run in the model's precision
        return picked - whole, soft

    def _minus_target(self, soft: Tensor, share: Tensor, index: Tensor, elsewhere: Tensor | None) -> Tensor:
        """softmax over this rank's slice -> softmax over all - e_target, in place; share [rows]: the slice's part of the whole sum."""
        hit = soft.new_full(index.shape, -1.0)
        if elsewhere is not None:
            soft.mul_(share[:, None])
            hit.masked_fill_(elsewhere, 0.0)
        return soft.scatter_add_(1, index[:, None], hit[:, None])


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


def _blocks(rows: Tensor | None, count: int, size: int) -> Iterator[slice | Tensor]:
    """Row numbers of each block: of `rows` where given, else of range(count)."""
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield slice(start, stop) if rows is None else rows[start:stop]


def _active(weights: Tensor) -> Tensor | None:
    """Numbers of the rows with a weight; None = take all of them. On a GPU counting would make the CPU wait, so all are taken."""
    if weights.device.type != "cpu":
        return None
    rows = weights.nonzero()[:, 0]
    return None if rows.numel() == weights.numel() else rows


class _NLL(torch.autograd.Function):
    """sum(weights * nll); gradients are ready when forward returns."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, tp: Group, block: tuple[int, bool]) -> Tensor:
        wanted_rows, differentiable = block
        wants = ctx.needs_input_grad[:2] if differentiable else (False, False)
        x = hidden.reshape(-1, hidden.shape[-1])
        weights = weights.reshape(-1).float()
        index, elsewhere = local_targets(labels.reshape(-1), weight.shape[0], tp)
        rows = _active(weights)
        count = x.shape[0] if rows is None else rows.numel()
        size = min(block_rows_for(weight.shape[0], weight.device, wanted_rows), max(count, 1))
        grads = _Gradients(x, weight, tp, wants, several=count > size)
        softmax = _Softmax(size, weight, tp)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for at in _blocks(rows, count, size):
            x_at, index_at, factor = x[at], index[at], weights[at]
            away = None if elsewhere is None else elsewhere[at]
            logps, slope = softmax(x_at, index_at, away, slope=any(wants))
            # 0 * inf is not 0: an unweighted row must not spoil the sum.
            total -= (logps * factor).masked_fill(factor == 0, 0.0).sum()
            if any(wants):
                grads.add(at, x_at, slope, factor)
        grads.finish()
        ctx.hidden_shape = hidden.shape
        ctx.grads = grads
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise TrainingError("the loss of the head was differentiated twice", fix="form the loss again, or use token_logps")
        # The scale (1 / tokens, loss scale) comes last: before it, 16-bit gradients could underflow.
        x = None if grads.x is None else grads.x.mul_(upstream[0]).view(ctx.hidden_shape)
        return x, None if grads.w is None else grads.w.mul_(upstream[0]), None, None, None, None


class _TokenLogps(torch.autograd.Function):
    """log p(target) of every row with a mask; backward computes the logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, tp: Group, block: int) -> Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        index, elsewhere = local_targets(targets.reshape(-1), weight.shape[0], tp)
        rows = None if mask is None else _active(mask.reshape(-1))
        count = x.shape[0] if rows is None else rows.numel()
        size = min(block_rows_for(weight.shape[0], weight.device, block), max(count, 1))
        softmax = _Softmax(size, weight, tp)
        out = torch.zeros(x.shape[0], dtype=torch.float32, device=x.device)
        for at in _blocks(rows, count, size):
            out[at] = softmax(x[at], index[at], None if elsewhere is None else elsewhere[at], slope=False)[0]
        if mask is not None and rows is None:
            out.masked_fill_(mask.reshape(-1) == 0, 0.0)
        ctx.save_for_backward(hidden, weight, index, elsewhere, rows, mask)
        ctx.tp, ctx.size = tp, size
        return out.view(targets.shape)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden, weight, index, elsewhere, rows, mask = ctx.saved_tensors
        x = hidden.reshape(-1, hidden.shape[-1])
        # Loss = sum(upstream * logp), so the weight of -log p is -upstream.
        factors = -upstream[0].reshape(-1).float()
        if mask is not None and rows is None:
            factors = factors.masked_fill(mask.reshape(-1) == 0, 0.0)
        count = x.shape[0] if rows is None else rows.numel()
        grads = _Gradients(x, weight, ctx.tp, ctx.needs_input_grad[:2], several=count > ctx.size)
        softmax = _Softmax(ctx.size, weight, ctx.tp)
        for at in _blocks(rows, count, ctx.size):
            x_at = x[at]
            _, slope = softmax(x_at, index[at], None if elsewhere is None else elsewhere[at], slope=True)
            grads.add(at, x_at, slope, factors[at])
        grads.finish()
        return None if grads.x is None else grads.x.view(hidden.shape), grads.w, None, None, None, None


def blockwise_nll(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, tp: Group, block: int = 0) -> Tensor:
    """sum(weights * -log softmax(hidden weight^T)[label]), a float32 scalar.

    hidden [..., h] replicated over tp, weight [v / tp, h], labels [...] int64, weights [...] float (any sign; 0 = not computed).
    Gradients of hidden (complete) and weight are made on the way when wanted; then backward may run once.
    """
    # Inside a Function's forward gradients are always off, so whether they are wanted is asked here.
    out: Tensor = _NLL.apply(hidden, weight, labels, weights, tp, (block, torch.is_grad_enabled()))
    return out


def blockwise_token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, tp: Group, block: int = 0) -> Tensor:
    """log softmax(hidden weight^T)[target] [...] float32, 0 where mask [...] is 0. Shapes as in `blockwise_nll`."""
    out: Tensor = _TokenLogps.apply(hidden, weight, targets, mask, tp, block)
    return out
