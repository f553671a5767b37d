# SPDX-License-Identifier: Apache-2.0
"""Finds a rank whose copy of a weight is not that of the others: memory or a sum over ranks went wrong without a word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from megatron.engine.base import Engine, StepResult
from megatron.errors import TrainingError
from megatron.hooks.base import BaseHook, TrainState, Verdict
from megatron.mpu.collectives import any_rank, of_all_ranks
from megatron.mpu.comm import all_gather
from megatron.mpu.groups import Group
from megatron.mpu.sharding import Replicated, sharding_of

CHUNK = 1 << 20
"""Elements that are digested at a time; more would only need more memory."""

_MOST_LINES = 20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: Tensor) -> Tensor:
    """A number, int64 [], that depends on every bit and on where it is: the sum of bits(element i) * (2 i + 1), modulo 2**64.

    Two tensors that differ in one element never have the same one, since an odd factor can be divided by modulo 2**64.
    """
    flat = tensor.detach().contiguous().view(-1)
    whole = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    factors = torch.arange(1, 2 * min(CHUNK, max(1, whole.numel())), 2, dtype=torch.int64, device=flat.device)
    for start in range(0, whole.numel(), CHUNK):
        part = whole[start : start + CHUNK].to(torch.int64)
        total += (part * factors[: part.numel()]).sum() + 2 * start * part.sum()
    return total


def odd_ones(names: Sequence[str], digests: Tensor, group: Group, axis: str) -> list[str]:
    """What differs, in words. digests: [ranks of the group, names]"""
    found = []
    for name, column in zip(names, digests.T.tolist(), strict=True):
        (usual, count), *others = Counter(column).most_common()
        if not others:
            continue
        ranks = [rank for rank, number in zip(group.ranks, column, strict=True) if number != usual]
        if 2 * count > len(column):
            found.append(f"{name} on rank {_listed(ranks)} is not what it is on the other {count} {axis} ranks")
        else:
            found.append(f"{name} is not the same on the {axis} ranks {_listed(group.ranks)}, and no value has a majority")
    return found


class ReplicasHook(BaseHook):
    """Compares, every `interval` steps, weights that must be equal bit by bit: of ranks that are replicas, and of tensor ranks
    those that are not split."""

    def __init__(self, *, interval: int) -> None:
        self.interval = interval
        self._parameters: dict[str, nn.Parameter] = {}
        self._replicated: frozenset[str] = frozenset()

    def on_start(self, state: TrainState, engine: Engine) -> None:
        """Which parameters there are, and which of them every tensor rank has whole."""
        module = engine.module()
        self._parameters = dict(module.named_parameters())
        how = sharding_of(module)
        self._replicated = frozenset(name for name in self._parameters if isinstance(how.get(name, Replicated()), Replicated))

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """Raises TrainingError, on every rank, naming ranks and tensors."""
        if state.iteration % self.interval:
            return Verdict.CONTINUE
        own = {name: digest(parameter) for name, parameter in self._parameters.items()}
        groups = engine.groups
        shared = {name: number for name, number in own.items() if name in self._replicated}
        # Each group tells its own; all ranks then tell all.
        lines = [*_compare(own, groups.replicas, "replica"), *_compare(shared, groups.tp, "tensor")]
        if any_rank(bool(lines), groups.world, engine.device):
            everyone = dict.fromkeys(line for found in of_all_ranks(lines, groups.world) for line in found)
            shown = [f"    {line}" for line in list(everyone)[:_MOST_LINES]]
            if len(everyone) > _MOST_LINES:
                shown.append(f"    and {len(everyone) - _MOST_LINES} more")
            raise TrainingError(
                f"weights differ between ranks at step {state.iteration}:\n" + "\n".join(shown),
                where=f"iteration {state.iteration}; they were equal {self.interval} steps before, or that was before this run began",
                mend="look at the memory and the network of the hosts of these ranks, and resume from the last checkpoint without them",
            )
        return Verdict.CONTINUE


def _compare(digests: Mapping[str, Tensor], group: Group, axis: str) -> list[str]:
    if group.size == 1 or not digests:
        return []
    row = torch.stack(list(digests.values())).unsqueeze(0)
    return odd_ones(list(digests), all_gather(row, group, 0), group, axis)


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)
