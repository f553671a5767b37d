# SPDX-License-Identifier: Apache-2.0
"""Context parallelism in attention: the ranks that share a sequence compute the attention of all of it.

Ring attention (Liu et al., arXiv 2310.01889): queries stay, keys and values travel round the ranks. Exact: softmax is put together
piece by piece (Milakov & Gimelshein, arXiv 1805.02867) in float32. Ulysses attention (Jacobs et al., arXiv 2309.14509) through DeepSpeed:
rows are exchanged for heads, then any back end serves. This is the one file that names deepspeed.sequence.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megatron.errors import BackendError
from megatron.model.attention.backends import Attend
from megatron.model.attention.inputs import AttentionInputs, PackedSequences, ordinals
from megatron.model.spec import AttentionSpec, BackendName
from megatron.mpu.comm import Shift, shift
from megatron.mpu.context import ContextPlan
from megatron.mpu.groups import Group


@dataclass(frozen=True, kw_only=True)
class BlockMask:
    """Causal, within a window, within documents; positions count from the beginning of a whole row.

    starts:   where the documents of each row begin; None = each row is one
    numbers:  [b, s] which document of its row a token is in
    """

    device: torch.device
    window: int | None = None
    starts: tuple[tuple[int, ...], ...] | None = None
    numbers: Tensor | None = None

    @classmethod
    def of(cls, documents: PackedSequences | None, window: int | None, device: torch.device) -> BlockMask:
        """That of whole rows."""
        if documents is None:
            return cls(device=device, window=window)
        length = documents.segment_ids.shape[1]
        rows: list[list[int]] = [[] for _ in range(documents.segment_ids.shape[0])]
        for start in accumulate(documents.lengths()[:-1], initial=0):
            rows[start // length].append(start % length)
        starts = tuple(tuple(row) for row in rows)
        return cls(device=device, window=window, starts=starts, numbers=ordinals(documents.segment_ids))

    def seen(self, queries: range, keys: range) -> range:
        """The keys outside which no query of any row sees anything; empty when no query sees any of them."""
        first = queries.start
        back = 0 if self.starts is None else min(self._openings(first))
        if self.window is not None:
            back = max(back, first - self.window)
        return range(max(keys.start, back), max(min(keys.stop, queries.stop), keys.start, back))

    def mask(self, queries: range, keys: range) -> Tensor | None:
        """Which queries see which keys, bool [b or 1, q, k]; None = all see all."""
        last = queries.stop - 1
        # Every row's last query must be in a document that has begun when the keys do.
        one_document = self.starts is None or max(self._openings(last)) <= keys.start
        near = self.window is None or last - keys.start <= self.window
        if one_document and near and keys.stop - 1 <= queries.start:
            return None
        q, k = (torch.arange(run.start, run.stop, device=self.device) for run in (queries, keys))
        behind = q[:, None] - k
        see = (behind >= 0)[None]
        if self.window is not None:
            see = see & (behind <= self.window)
        if self.numbers is None or one_document:
            return see
        return see & (self.numbers[:, queries.start : queries.stop, None] == self.numbers[:, None, keys.start : keys.stop])

    def _openings(self, position: int) -> list[int]:
        """Where each row's document at a position begins."""
        assert self.starts is not None
        return [row[bisect_right(row, position) - 1] for row in self.starts]


# ---- ring attention -------------------------------------------------------------------------------------------------

# A piece of scores has at most about this many numbers, and few enough queries that little is computed above the diagonal.
SCORES = 2**24
QUERIES = 256


def ring_refuses(spec: AttentionSpec) -> str | None:
    """Why the ring cannot serve a spec."""
    if spec.rpe is not None or spec.alibi:
        return "ring attention has no bias on the scores (rpe, alibi)"
    if spec.dropout > 0.0:
        return "ring attention has no attention dropout"
    if spec.backend is not BackendName.AUTO:
        return f"ring attention is computed in one way, and not by attention_backend {spec.backend.value}"
    return None


def ring_attention(q: Tensor, k: Tensor, v: Tensor, view: AttentionInputs, plan: ContextPlan) -> Tensor:
    """This rank's queries against the keys of all ranks, own rows as in `plan.rows`.

    q [b, s / cp, n, d], k and v [b, s / cp, g, d], view of whole rows -> [b, s / cp, n, d]
    Every rank of plan.group calls this at the same time, also in the backward pass.
    """
    # The view's divisor keeps 16-bit scores in range; here there are none.
    schedule = RingSchedule(plan, BlockMask.of(view.documents, view.window, q.device), q.shape[1] * plan.size, view.scale)
    out: Tensor = _Ring.apply(q, k, v, schedule)
    return out


@dataclass(frozen=True)
class RingTile:
    """Own queries and visiting keys that meet, as slices of what a rank holds; mask as in `BlockMask.mask`."""

    queries: slice
    keys: slice
    mask: Tensor | None


@dataclass(frozen=True)
class RingSchedule:
    """What every step round the ring needs. length: of whole rows; scale: factor on q k."""

    plan: ContextPlan
    block_mask: BlockMask
    length: int
    scale: float

    def pieces(self, step: int, shape: _Shape) -> Iterator[RingTile]:
        """What is to be computed when the keys have gone `step` ranks."""
        rows = shape.b * shape.heads * shape.repeat  # of scores for each query, over the batch
        group = self.plan.group
        visitors = self.plan.runs(self.length, (group.rank - step) % group.size)
        at = 0
        for run in self.plan.runs(self.length):
            size = max(1, min(QUERIES, SCORES // (rows * len(run))))
            for start in range(0, len(run), size):
                queries = run[start : start + size]
                yield from self._against(slice(at + start, at + start + len(queries)), queries, visitors)
            at += len(run)

    def _against(self, own: slice, queries: range, visitors: tuple[range, ...]) -> Iterator[RingTile]:
        at = 0
        for run in visitors:
            keys = self.block_mask.seen(queries, run)
            if keys:
                begin = at + keys.start - run.start
                yield RingTile(own, slice(begin, begin + len(keys)), self.block_mask.mask(queries, keys))
            at += len(run)


@dataclass(frozen=True)
class _Shape:
    """b rows, c positions, `heads` key heads that each serve `repeat` query heads."""

    b: int
    c: int
    heads: int
    repeat: int

    @classmethod
    def of(cls, q: Tensor, heads: int) -> _Shape:
        return cls(q.shape[0], q.shape[1], heads, q.shape[2] // heads)

    def rows(self, queries: slice) -> slice:
        """Where the queries of these positions lie among the c * repeat."""
        return slice(queries.start * self.repeat, queries.stop * self.repeat)


def _group(x: Tensor, heads: int) -> Tensor:
    """[b, c, g r, d] -> [b g, c r, d] contiguous."""
    b, c, n, d = x.shape
    return x.reshape(b, c, heads, n // heads, d).transpose(1, 2).reshape(b * heads, -1, d)


def _ungroup(x: Tensor, shape: _Shape) -> Tensor:
    """[b g, c r, d] -> [b, c, g r, d]."""
    return x.view(shape.b, shape.heads, shape.c, shape.repeat, -1).transpose(1, 2).flatten(2, 3)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b with sums and result in float32 or better. dtype: of the model; what a 16-bit one stores, a GPU multiplies as it is."""
    if a.is_cuda and dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
    exact = torch.promote_types(dtype, torch.float32)
    return torch.bmm(a.to(exact), b.to(exact))


def _scores(q: Tensor, k: Tensor, piece: RingTile, schedule: RingSchedule, shape: _Shape) -> Tensor:
    """Scaled scores of a piece, -inf where nothing is seen; [b g, rows, keys]."""
    scores = _product(q, k.mT, q.dtype).mul_(schedule.scale)
    if piece.mask is not None:
        mask = piece.mask[:, None, :, None]  # [b or 1, 1, queries, 1, keys]
        scores.view(shape.b, shape.heads, -1, shape.repeat, scores.shape[-1]).masked_fill_(~mask, float("-inf"))
    return scores


class _Ring(torch.autograd.Function):
    """Inside, the query heads that share a key head are further queries of it: q [b g, c r, d] with n = g r, c = s / cp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, schedule: RingSchedule) -> Tensor:
        group, shape, exact = schedule.plan.group, _Shape.of(q, k.shape[2]), torch.promote_types(q.dtype, torch.float32)
        q, own = _group(q, shape.heads), torch.stack((_group(k, shape.heads), _group(v, shape.heads)))
        top = torch.full(q.shape[:2], float("-inf"), dtype=exact, device=q.device)
        total, out, kv = torch.zeros_like(top), torch.zeros_like(q, dtype=exact), own
        for step in range(group.size):
            ahead = shift(kv, group) if step + 1 < group.size else None
            for piece in schedule.pieces(step, shape):
                rows = shape.rows(piece.queries)
                k, v = kv[:, :, piece.keys]
                scores = _scores(q[:, rows], k, piece, schedule, shape)
                new = torch.maximum(top[:, rows], scores.amax(dim=-1))
                # A query that has seen nothing so far has no highest score; any number serves in its place.
                level = new.masked_fill(new == float("-inf"), 0.0)
                shrink = (top[:, rows] - level).exp_()
                weights = scores.sub_(level[..., None]).exp_()
                total[:, rows] = total[:, rows] * shrink + weights.sum(dim=-1)
                out[:, rows] = out[:, rows] * shrink[..., None] + _product(weights, v, q.dtype)
                top[:, rows] = new
            kv = kv if ahead is None else ahead.wait()
        out = out.div_(total[..., None]).to(q.dtype)
        # Last: the logarithm of each query's sum of exponentials, float32 [b g, c r].
        ctx.save_for_backward(q, own, out, top + total.log())
        ctx.schedule, ctx.shape = schedule, shape
        return _ungroup(out, shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """In float32; weights are made again from lse (Dao et al., arXiv 2205.14135, app. B.2)."""
        (q, kv, out, lse), schedule, shape = ctx.saved_tensors, ctx.schedule, ctx.shape
        group, exact, dout = schedule.plan.group, lse.dtype, _group(grads[0], shape.heads)
        delta = (dout.to(exact) * out.to(exact)).sum(dim=-1)
        dq = torch.zeros_like(q, dtype=exact)
        behind: Shift | None = None  # the gradients of the keys follow them, one step late, so both travel while others compute
        for step in range(group.size):
            ahead = shift(kv, group) if step + 1 < group.size else None
            dkv = torch.zeros_like(kv, dtype=exact)
            for piece in schedule.pieces(step, shape):
                rows = shape.rows(piece.queries)
                (k, v), (dk, dv) = kv[:, :, piece.keys], dkv[:, :, piece.keys]
                weights = _scores(q[:, rows], k, piece, schedule, shape).sub_(lse[:, rows, None]).exp_()
                dv += _product(weights.mT, dout[:, rows], q.dtype)
                slope = _product(dout[:, rows], v.mT, q.dtype).sub_(delta[:, rows, None]).mul_(weights).mul_(schedule.scale)
                dq[:, rows] += _product(slope, k, q.dtype)
                dk += _product(slope.mT, q[:, rows], q.dtype)
            if behind is not None:
                dkv += behind.wait()
            behind = shift(dkv, group)
            kv = kv if ahead is None else ahead.wait()
        assert behind is not None
        dk, dv = (_ungroup(grad, replace(shape, repeat=1)) for grad in behind.wait().to(kv.dtype))
        return _ungroup(dq.to(q.dtype), shape), dk, dv, None


# ---- Ulysses --------------------------------------------------------------------------------------------------------


def ulysses_attention(q: Tensor, k: Tensor, v: Tensor, view: AttentionInputs, plan: ContextPlan, inner: Attend) -> Tensor:
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
