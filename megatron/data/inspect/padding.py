# SPDX-License-Identifier: Apache-2.0
"""What each way of making batches wastes on padding and on waiting, simulated from lengths. Knows no tokens and trains nothing.

Letters: n samples, k rows per sample, t steps, r ranks, m micro-steps per step, b samples per micro-batch.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.errors import DataError

MAX_STEPS = 256
MIN_STEPS = 32
MEGA_BATCHES = 50
"""Grouping by length sorts this many micro-batches of all ranks at a time, as the Hugging Face trainer does."""
ROUNDING = 128
"""A packed micro-batch is filled up to a multiple of this many tokens."""
GOOD = 1.02
"""The fitted capacity costs at most this much more time than no waste at all."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How the set would be trained.

    batch:     samples per step on all ranks; micro: samples per rank and micro-step
    capacity:  tokens per rank and micro-step of a packed batch; None: fitted
    attention: cost of one token's attention to one other, in units of a token's other cost (about 2e-5 for 7B models)
    """

    ranks: int = 4
    batch: int = 128
    micro: int = 4
    capacity: int | None = None
    attention: float = 1.9e-5
    seed: int = 0


class Mode(NamedTuple):
    """One way of making batches.

    utilisation:    real tokens / computed tokens
    time:           multiple of the time without any waste, the ranks meeting once a step
    time_each:      the same, the ranks meeting after every micro-step (ZeRO-3, FSDP)
    micro_steps:    per step; peak: most tokens in one micro-batch
    """

    name: str
    utilisation: float
    time: float
    time_each: float
    micro_steps: float
    peak: int


def waste(rows: NDArray[np.int64], setup: Setup, max_length: int) -> tuple[list[Mode], int]:
    """The modes for samples of `rows` [n, k] tokens (none longer than max_length), and the capacity of the packed one."""
    if min(setup.ranks, setup.batch, setup.micro) < 1 or (setup.capacity is not None and setup.capacity < 1):
        raise DataError("ranks, batch, micro batch and capacity must be at least 1", where="command line", fix="give whole numbers from 1")
    rng = np.random.default_rng(setup.seed)
    group = setup.ranks * setup.micro
    micro_steps = max(1, round(setup.batch / group))
    shape = (-1, micro_steps, setup.ranks, setup.micro)
    sample = rows[_draw(len(rows), micro_steps * group, rng)]
    longest = sample.max(axis=1)
    by_length = np.argsort(longest, kind="stable").reshape(-1, group)
    bucketed = by_length[rng.permutation(len(by_length))].reshape(shape)
    drawn = np.arange(len(sample)).reshape(shape)
    grouped = _grouped(longest, MEGA_BATCHES * group).reshape(shape)
    capacity = setup.capacity or _fit_capacity(sample, setup, max_length)
    modes = [
        _fixed(sample, drawn, setup, max_length),
        _padded("padded, random", sample, drawn, setup),
        _padded("padded, grouped by length", sample, grouped, setup),
        _padded("padded, sorted buckets", sample, bucketed, setup),
        _padding_free(sample, drawn, setup),
        packed(sample, replace(setup, capacity=capacity)),
    ]
    return modes, capacity


def packed(sample: NDArray[np.int64], setup: Setup) -> Mode:
    """Token-budget packing: each step's samples, whole, into as few micro-batches of `capacity` tokens per rank as hold them, evenly."""
    totals, costs = sample.sum(axis=1), _cost(sample, setup).sum(axis=1)
    if setup.capacity is None or int(totals.max()) > setup.capacity:
        raise DataError(
            f"the longest sample has {int(totals.max())} tokens, which a micro-batch of {setup.capacity} cannot hold",
            where="--capacity",
            fix="give a larger capacity or a smaller max_length",
        )
    computed, time, time_each, micro_steps, peak = 0, 0.0, 0.0, 0, 0
    firsts = range(0, len(sample), min(setup.batch, len(sample)))
    for first in firsts:
        some, cost = totals[first : first + setup.batch], costs[first : first + setup.batch]
        bins = _bins(some, cost, setup.ranks, setup.capacity)
        loads = np.array([[int(some[np.array(held, int)].sum()) for held in step] for step in bins])  # [m, r]
        work = np.array([[float(cost[np.array(held, int)].sum()) for held in step] for step in bins])
        filled = -(-loads // ROUNDING) * ROUNDING
        work = work + filled - loads
        computed += int(filled.sum())
        peak = max(peak, int(loads.max()))
        time += float(work.sum(axis=0).max())
        time_each += float(work.max(axis=1).sum())
        micro_steps += len(bins)
    ideal = float(costs.sum()) / setup.ranks
    return Mode(
        f"token budget {setup.capacity}", int(totals.sum()) / computed, time / ideal, time_each / ideal, micro_steps / len(firsts), peak
    )


def _draw(n: int, batch: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Numbers of the samples of whole steps, in random order; a small set is gone through several times."""
    steps = min(max(n // batch, MIN_STEPS), MAX_STEPS)
    passes = -(-steps * batch // n)
    return np.concatenate([rng.permutation(n) for _ in range(passes)])[: steps * batch]


def _grouped(longest: NDArray[np.int64], mega: int) -> NDArray[np.int64]:
    order = np.arange(len(longest))
    return np.concatenate([part[np.argsort(-longest[part], kind="stable")] for part in np.split(order, range(mega, len(order), mega))])


def _cost(lengths: NDArray[np.int64], setup: Setup) -> NDArray[np.float64]:
    """Work of sequences of these lengths, in tokens: linear layers and causal attention."""
    return lengths + setup.attention * lengths.astype(np.float64) ** 2


def _mode(name: str, real: NDArray[np.int64], computed: NDArray[np.int64], work: NDArray[np.float64], ideal: float) -> Mode:
    """real, computed, work [t, m, r]; ideal: work of one rank without waste"""
    time, time_each = work.sum(axis=1).max(axis=1).sum(), work.max(axis=2).sum()
    return Mode(name, float(real.sum() / computed.sum()), float(time / ideal), float(time_each / ideal), work.shape[1], int(computed.max()))


def _padded(name: str, sample: NDArray[np.int64], order: NDArray[np.int64], setup: Setup) -> Mode:
    """Every row as long as the longest of its micro-batch. order [t, m, r, b]"""
    rows = sample[order]  # [t, m, r, b, k]
    count, longest = rows.shape[3] * rows.shape[4], rows.max(axis=(3, 4))
    ideal = float(_cost(sample, setup).sum()) / setup.ranks
    return _mode(name, rows.sum(axis=(3, 4)), count * longest, count * _cost(longest, setup), ideal)


def _fixed(sample: NDArray[np.int64], order: NDArray[np.int64], setup: Setup, max_length: int) -> Mode:
    """Every row as long as max_length: the loader's `unpacked`."""
    real = sample[order].sum(axis=(3, 4))
    count = order.shape[3] * sample.shape[1]
    computed = np.full_like(real, count * max_length)
    work = count * _cost(np.full_like(real, max_length), setup)
    return _mode("padded to max_length", real, computed, work, float(_cost(sample, setup).sum()) / setup.ranks)


def _padding_free(sample: NDArray[np.int64], order: NDArray[np.int64], setup: Setup) -> Mode:
    """No padding, but as many samples in each micro-batch, however long they are."""
    real = sample[order].sum(axis=(3, 4))
    work = _cost(sample, setup)[order].sum(axis=(3, 4))
    return _mode("padding-free, random", real, real, work, float(work.sum()) / setup.ranks)


def _bins(totals: NDArray[np.int64], costs: NDArray[np.float64], ranks: int, capacity: int) -> list[list[list[int]]]:
    """Samples of one step as [micro-step][rank] -> samples: costliest first, each to the micro-batch with least work (Graham, 1969)."""
    micro_steps = max(1, int(-(-totals.sum() // (ranks * capacity))))
    while True:
        heap: list[tuple[float, int, list[int]]] = [(0.0, number, []) for number in range(micro_steps * ranks)]
        for one in np.argsort(-costs, kind="stable"):
            work, number, held = heap[0]
            held.append(int(one))
            heapq.heapreplace(heap, (work + float(costs[one]), number, held))
        if max(int(totals[np.array(held, int)].sum()) for _, _, held in heap) <= capacity:
            # Those with equal work run together, so that no rank waits.
            by_work = [held for _, _, held in sorted(heap, key=lambda entry: (-entry[0], entry[1]))]
            return [by_work[first : first + ranks] for first in range(0, len(by_work), ranks)]
        micro_steps += 1


def _fit_capacity(sample: NDArray[np.int64], setup: Setup, max_length: int) -> int:
    """Smallest power of two that holds every sample whole and wastes next to no time; memory may allow no more than its first value."""
    capacity = 1
    while capacity < max_length * sample.shape[1]:
        capacity *= 2
    few = sample[: setup.batch * 16]
    for _ in range(8):
        if packed(few, replace(setup, capacity=capacity)).time_each <= GOOD:
            break
        capacity *= 2
    return capacity
