# SPDX-License-Identifier: Apache-2.0
"""Random numbers per axis of parallelism, derived from torch's default generator so that whoever saves that, saves these."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron.mpu.groups import Group


@contextmanager
def per_rank(group: Group, device: torch.device) -> Iterator[None]:
    """Inside, random numbers differ between the ranks of the group (dropout on a split tensor).

    Outside they are expected to agree between those ranks, and go on doing so: each entry draws one common number,
    from which every rank makes its own seed. No state of its own, so activation recomputation and resume need
    nothing beyond torch's generators. Nothing happens in a group of one.
    """
    if group.size == 1:
        yield
        return
    common = int(torch.randint(2**62, (), device="cpu"))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed((common + group.rank * 0x9E3779B97F4A7C15) % 2**63)
        yield
