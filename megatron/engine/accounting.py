# SPDX-License-Identifier: Apache-2.0
"""Sums over micro batches and data ranks: the denominator before a step, the metrics after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from megatron.data.batch import Batch
from megatron.mpu.comm import all_reduce
from megatron.mpu.groups import Group
from megatron.objectives.base import LossTerms, Objective


def global_denominator(objective: Objective, micro_batches: Sequence[Batch], dp: Group, device: torch.device) -> Tensor:
    """What the losses of a whole step are divided by: trained tokens (sequences, pairs) over micro batches and data ranks.

    Scalar float32 on `device`; 1 when nothing is trained, so that such a step has loss 0 and no gradient.
    """
    local = sum(objective.denominator(batch) for batch in micro_batches)
    total = all_reduce(torch.tensor(float(local), dtype=torch.float32, device=device), dp)
    return torch.where(total > 0, total, torch.ones_like(total))


def targets_of(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Everything an objective's loss reads, on `device`, in a fixed order."""
    named = {"labels": batch.labels, "loss_weight": batch.loss_weight, "segments": batch.segments, **batch.extras}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in named.items()}


class MetricSum:
    """Running sums of metrics of one step or one evaluation."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one micro batch's metrics (scalars)."""
        for name, value in metrics.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def reduce(self, dp: Group, device: torch.device, **others: Tensor | None) -> tuple[dict[str, float], dict[str, float]]:
        """Sum over data ranks and bring to the host together with `others` (already equal on all ranks), in one transfer."""
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names]) if names else torch.zeros(0, device=device)
        sums = all_reduce(sums, dp)
        known = {name: value for name, value in others.items() if value is not None}
        values = torch.cat([sums, *(value.detach().float().reshape(1).to(device) for value in known.values())]).tolist()
        return dict(zip(names, values, strict=False)), dict(zip(known, values[len(names) :], strict=True))


def mean_over(
    objective: Objective,
    micro_batches: Iterable[Batch],
    terms: Callable[[Objective, Batch, Tensor], LossTerms],
    dp: Group,
    device: torch.device,
) -> dict[str, float]:
    """Metrics over a stream of micro batches, weighted by what each of them trains; sums over data ranks, no gradients.

    terms: (objective, batch, denominator) -> LossTerms
    """
    meter, weight = MetricSum(), 0.0
    one = torch.ones((), dtype=torch.float32, device=device)
    with torch.no_grad():
        for batch in micro_batches:
            meter.add(terms(objective, batch, one).metrics)
            weight += objective.denominator(batch)
    meter.add({"": torch.tensor(weight, device=device)})
    sums, _ = meter.reduce(dp, device)
    total = sums.pop("") or 1.0
    return {name: value / total for name, value in sums.items()}
