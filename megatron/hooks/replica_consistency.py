# SPDX-License-Identifier: Apache-2.0
"""Ends a run whose ranks no longer hold the same weights where they should, by a checksum over their bits.

What it sees is what ranks compute with, at the moment it looks. Where ranks keep copies of their own (float32 without ZeRO), a copy that
went astray stays so and is found at the next look, however it came about. With ZeRO 1 and 2, and with bfloat16, each update hands out
all weights anew from master weights of which every entry lies on one rank. There a look sees what went wrong since the last update began
to hand out; an older fault in a copy has been overwritten, though not what it did to gradients, and a fault in the master weights is the
same everywhere.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from megatron.engine.base import Engine, StepResult
from megatron.errors import TrainingError
from megatron.hooks.base import Hook, TrainState, Verdict
from megatron.log import get_logger
from megatron.mpu.collectives import any_rank, of_all_ranks
from megatron.mpu.comm import all_reduce
from megatron.mpu.groups import Group, Groups
from megatron.mpu.sharding import Replicated, sharding_of

log = get_logger(__name__)

_MOST = 8


class ReplicaHook(Hook):
    """Looks every `interval` steps, right after the update. Must stand before what saves."""

    def __init__(self, *, interval: int) -> None:
        self.interval = interval
        self._equal: int | None = None

    def on_start(self, state: TrainState, engine: Engine) -> None:
        """A run that begins with different weights must not go on with them."""
        groups = engine.groups
        if groups.replicas.size == groups.tp.size == 1:
            log.info("replica_check_interval: no weight of this run is held twice, so there is nothing to compare")
        self._look(state, engine)

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """Raise TrainingError, on every rank, where weights differ."""
        if state.iteration % self.interval == 0:
            self._look(state, engine)
        return Verdict.CONTINUE

    def _look(self, state: TrainState, engine: Engine) -> None:
        since = time.perf_counter()
        lines = drifted(engine.module(), engine.groups, engine.device)
        if not lines:
            log.debug("weights are equal on all replicas at iteration %d (%.1f ms)", state.iteration, 1e3 * (time.perf_counter() - since))
            self._equal = state.iteration
            return
        shown = lines[:_MOST] + ([f"and {len(lines) - _MOST} weights more"] if len(lines) > _MOST else [])
        known = self._equal is not None and self._equal < state.iteration  # a run may have gone back since
        before = f" They were equal at iteration {self._equal}: go on from a checkpoint up to there." if known else ""
        raise TrainingError(
            "ranks that should hold the same weights do not:\n" + "\n".join(f"    {line}" for line in shown),
            where=f"iteration {state.iteration}, replica_check_interval {self.interval}",
            fix=f"look for a faulty device, memory or network on the hosts of these ranks.{before}",
        )


CHUNK, CHUNK_ON_CPU = 2**22, 2**16
"""Entries that are widened to 64 bits at a time; a host is six times faster on what stays in its cache."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LEAST = torch.iinfo(torch.int64).min
_TIED = "tied_modules."  # where a pipeline keeps a module of several stages


def digest(x: Tensor) -> Tensor:
    """Checksum of a tensor's bits, on its device: the sum over entries i of bits(i) (2 i + 1), modulo 2^64. []

    An odd factor has an inverse, so any change of one entry changes the sum. Exchanging two entries changes it by the difference of
    their bits times 2 (i - j), which is less than 2^64 for entries of up to 32 bits and fewer than 2^31 of them.
    """
    bits = x.detach().contiguous().view(-1).view(_INTEGERS[x.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    size = min(CHUNK_ON_CPU if x.device.type == "cpu" else CHUNK, max(1, bits.numel()))
    odd = torch.arange(1, 2 * size, 2, dtype=torch.int64, device=x.device)
    for start in range(0, bits.numel(), size):
        part = bits[start : start + size].to(torch.int64)
        total += part.sum() * (2 * start)
        total += (part * odd[: part.numel()]).sum()
    return total


def digests(module: nn.Module) -> dict[str, Tensor]:
    """Of every parameter, by name."""
    return {name: digest(parameter) for name, parameter in module.named_parameters()}


def drifted(module: nn.Module, groups: Groups, device: torch.device) -> list[str]:
    """One line per weight that is not the same where it should be, the same lines on every rank. All ranks call it.

    Compared are: all weights over data (and context) ranks, unsplit ones over tensor ranks, tied ones over pipeline stages.
    """
    own = digests(module)
    shared = _shared(module, own, groups)
    differ = [_differs(part, group, device) for group, part in shared]
    if not any_rank(any(differ), groups.world, device):
        return []
    lines: list[str] = []
    for group, part in shared:
        # Every rank takes part: its group may differ where another's does not.
        lines += odd_ones(of_all_ranks(_on_host(part), group), group.ranks)
    return list(dict.fromkeys(line for found in of_all_ranks(lines, groups.world) for line in found))


def odd_ones(held: Sequence[Mapping[str, int]], ranks: Sequence[int]) -> list[str]:
    """What differs between ranks that each hold some of the weights. held: name -> digest, by rank

    >>> odd_ones([{"w": 5}, {"w": 6}, {"w": 5}, {}], ranks=(0, 2, 4, 6))
    ['w: rank 2 holds another than ranks 0, 4']
    >>> odd_ones([{"w": 5, "b": 1}, {"w": 6, "b": 1}], ranks=(0, 1))
    ['w: ranks 0, 1 hold different ones']
    """
    lines = []
    for name in dict.fromkeys(name for part in held for name in part):
        holders: dict[int, list[int]] = {}
        for rank, part in zip(ranks, held, strict=True):
            if name in part:
                holders.setdefault(part[name], []).append(rank)
        most = max(holders.values(), key=len)
        others = [rank for group in holders.values() if group is not most for rank in group]
        if not others:
            continue
        if len(most) > len(others):
            lines.append(f"{name}: {_named(sorted(others))} {'hold others' if len(others) > 1 else 'holds another'} than {_named(most)}")
        else:
            lines.append(f"{name}: {_named(sorted(most + others))} hold different ones")
    return lines


def _shared(module: nn.Module, own: Mapping[str, Tensor], groups: Groups) -> list[tuple[Group, dict[str, Tensor]]]:
    """Per axis on which anything is held twice: what of this rank's weights."""
    table = sharding_of(module)
    unsplit = {name: value for name, value in own.items() if isinstance(table.get(name), Replicated)}
    tied = {name: value for name, value in own.items() if name.startswith(_TIED)}
    axes = ((groups.replicas, dict(own)), (groups.tp, unsplit), (groups.pp, tied))
    return [(group, part) for group, part in axes if group.size > 1]


def _differs(part: Mapping[str, Tensor], group: Group, device: torch.device) -> bool:
    """Whether the ranks of a group that hold anything hold different things."""
    bounds = torch.full((2,), _LEAST, dtype=torch.int64, device=device)
    if part:
        whole = digest(torch.stack(list(part.values())))
        bounds = torch.stack([whole, ~whole])
    # The complement turns the order round, so one maximum gives the greatest and the smallest.
    greatest, least = all_reduce(bounds, group, maximum=True).tolist()
    return bool(least != _LEAST and greatest != ~least)


def _on_host(part: Mapping[str, Tensor]) -> dict[str, int]:
    values = torch.stack(list(part.values())).tolist() if part else []
    return dict(zip(part, values, strict=True))


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
