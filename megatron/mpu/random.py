# SPDX-License-Identifier: Apache-2.0
"""Random numbers that agree between tensor parallel ranks where tensors are equal, and differ where they are split.

Everything derives from torch's default generators, which are equal on all ranks of a tensor group: whoever saves and restores
those (a checkpoint, a recomputation), saves and restores this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.mpu.comm import own_slice
from megatron.mpu.groups import Group

_STRIDE = 0x9E3779B97F4A7C15
"""Keeps neighbouring seeds apart (2^64 / golden ratio)."""


def dropout(x: Tensor, p: float, tp: Group, *, training: bool = True) -> Tensor:
    """Drop entries of x [b, s, h], or of this rank's [b, s / tp, h] where the sequence is spread; the same ones at any tp.

    Where it is spread, the mask of the whole sequence is drawn on every rank and cut.
    """
    if p == 0.0 or not training:
        return x
    if not tp.sequence:
        return F.dropout(x, p)
    whole = x.new_ones(x.shape[0], x.shape[1] * tp.size, *x.shape[2:])
    return x * own_slice(F.dropout(whole, p), tp, 1)


def head_seeds(heads: int, tp: Group) -> tuple[int, ...]:
    """A seed for each of this rank's `heads` attention heads, from one number that all ranks of tp draw alike.

    A head's seed does not depend on how many ranks the heads are split over.
    """
    common = int(torch.randint(2**62, (), device="cpu"))
    first = tp.rank * heads
    return tuple((common + head * _STRIDE) % 2**63 for head in range(first, first + heads))


def drop_by_head(x: Tensor, p: float, seeds: Sequence[int]) -> Tensor:
    """Drop entries of x [b, n, ...], each of the n heads by its own seed; the default generator is left as it is."""
    keep = torch.empty_like(x, memory_format=torch.contiguous_format)
    for head, seed in enumerate(seeds):
        generator = torch.Generator(x.device).manual_seed(seed)
        mask = torch.rand(keep[:, head].shape, generator=generator, device=x.device) >= p
        keep[:, head] = mask.to(x.dtype)
    return x * keep.mul_(1.0 / (1.0 - p))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, the default generators go on from `seed`; outside they are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
