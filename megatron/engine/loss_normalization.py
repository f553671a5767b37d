# SPDX-License-Identifier: Apache-2.0
"""Sums over micro batches and data ranks: the denominator before a step, the metrics after it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron.data.batch import Batch
from megatron.errors import TrainingError
from megatron.mpu.collectives import of_all_ranks, of_last_rank
from megatron.mpu.comm import all_reduce
from megatron.mpu.context import ContextPlan
from megatron.mpu.groups import Group, Groups
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
    named = {"labels": batch.labels, "loss_weight": batch.loss_weight, "segment_ids": batch.segment_ids, **batch.extras}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in named.items()}


def part_of(batch: Batch, context: ContextPlan) -> Batch:
    """This context rank's part of a batch; `segment_ids` stay those of whole rows. The batch itself without context parallelism."""
    if context.size == 1:
        return batch
    own = context.own
    return replace(batch, tokens=own(batch.tokens), labels=own(batch.labels), loss_weight=own(batch.loss_weight))


class MetricSum:
    """Running sums of metrics of one step or one evaluation."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one micro batch's metrics (scalars)."""
        for name, value in metrics.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def reduce(self, groups: Groups, device: torch.device, **others: Tensor | None) -> tuple[dict[str, float], dict[str, float]]:
        """Sum over replicas and bring to the host together with `others` (already equal on all ranks), in one transfer.

        The sums of the last pipeline stage, which alone sees the loss, are everybody's.
        """
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names]) if names else torch.zeros(0, device=device)
        sums = all_reduce(sums, groups.replicas) if names else sums
        known = {name: value for name, value in others.items() if value is not None}
        values = torch.cat([sums, *(value.detach().float().reshape(1).to(device) for value in known.values())]).tolist()
        metrics = of_last_rank(dict(zip(names, values, strict=False)), groups.pp)
        return metrics, dict(zip(known, values[len(names) :], strict=True))


Terms = Callable[[Objective, Batch, Tensor], LossTerms]
"""(objective, batch, denominator) -> loss and metrics of one micro batch."""


def add_terms(objective: Objective, micro_batches: Iterable[Batch], terms: Terms, meter: MetricSum, device: torch.device) -> float:
    """Add the metrics of every micro batch, with denominator 1, to `meter`; returns how much they train."""
    weight = 0.0
    one = torch.ones((), dtype=torch.float32, device=device)
    with torch.no_grad():
        for batch in micro_batches:
            meter.add(terms(objective, batch, one).metrics)
            weight += objective.denominator(batch)
    return weight


def with_aux(terms: LossTerms, aux: Tensor | None, share: float) -> LossTerms:
    """`terms` with what the layers add to the loss (`Logits.aux`). share: 1 / micro batches of the step over all replicas"""
    return terms if aux is None else terms._replace(loss=terms.loss + aux * share)


def weighted_mean(meter: MetricSum, weight: float, groups: Groups, device: torch.device) -> dict[str, float]:
    """Metrics that were summed with denominator 1, divided by what the micro batches of all data ranks train.

    weight: what those of this data rank train
    """
    total = float(all_reduce(torch.tensor(weight, dtype=torch.float32, device=device), groups.dp).item())
    metrics, _ = meter.reduce(groups, device)
    return {name: value / (total or 1.0) for name, value in metrics.items()}


def require_same_batch(micro_batches: Sequence[Batch], groups: Groups) -> None:
    """Raise TrainingError when the ranks that must train on the same samples do not: those of one tensor and pipeline grid.

    They read the samples each for itself, so nothing but this compares them; it makes the host wait, so it is for debugging.
    """
    for axis, group in (("tensor", groups.tp), ("pipeline", groups.pp), ("context", groups.cp)):
        digests = of_all_ranks(digest_of(micro_batches), group)
        odd = [group.ranks[place] for place, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            raise TrainingError(
                f"rank {odd[0]} reads other samples than rank {group.ranks[0]}, which is in its {axis} parallel group",
                where="data paths",
                fix="check that all hosts see the same data files and index maps (index_map_dir, use_shared_fs)",
            )


def tokens_digest(micro_batches: Sequence[Batch], dp: Group) -> str:
    """A fingerprint of the rows of tokens of a step over all data ranks, whichever rank has which; for debugging.

    It shows that a run that went on, also at another number of ranks, took the samples that one run would have taken.
    """
    own = [hashlib.blake2b(row.numpy().tobytes()).digest() for batch in micro_batches for row in batch.tokens.cpu()]
    rows = [row for rows in of_all_ranks(own, dp) for row in rows]
    return hashlib.blake2b(b"".join(sorted(rows)), digest_size=16).hexdigest()


def digest_of(micro_batches: Sequence[Batch]) -> str:
    """A fingerprint of everything in the batches."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in micro_batches:
        for tensor in (batch.tokens, *targets_of(batch, torch.device("cpu")).values()):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
