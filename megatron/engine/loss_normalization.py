# SPDX-License-Identifier: Apache-2.0
"""Sums over micro batches and ranks: the denominators before a step, the metrics after it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron.data.batch import Batch, Extra, ExtraLayout
from megatron.errors import TrainingError
from megatron.mpu.collectives import of_all_ranks, of_last_rank
from megatron.mpu.comm import all_reduce
from megatron.mpu.context import ContextPlan
from megatron.mpu.groups import Group, Groups
from megatron.objectives.base import LossContext, LossTerms, Metric, Objective, ReadAny, Targets

if TYPE_CHECKING:
    from megatron.model.head import Logits


@dataclass(frozen=True)
class StepTotals:
    """Of one step, over micro batches and data ranks.

    denominators: name -> scalar float32; 1 where nothing was counted, so that such a step has loss 0 and no gradient
    consumed:     samples, tokens and padding among the tokens, in this order [3] float64
    """

    denominators: Mapping[str, Tensor]
    consumed: Tensor


def count(objective: Objective, micro_batches: Iterable[Batch]) -> dict[str, float]:
    """The denominators of this rank's micro batches."""
    total: Counter[str] = Counter()
    for batch in micro_batches:
        total.update(objective.denominators(batch))
    return dict(total)


def step_totals(objective: Objective, micro_batches: Sequence[Batch], dp: Group, device: torch.device) -> StepTotals:
    """What the losses of a whole step are divided by, and what the step consumes; one reduction."""
    if not micro_batches:
        raise TrainingError("a step without micro batches", fix="give every data rank at least one")
    counts = count(objective, micro_batches)
    names = sorted(counts)
    consumed = [sum(one) for one in zip(*((b.num_samples, b.tokens.numel(), b.padding) for b in micro_batches), strict=True)]
    local = torch.tensor([*(counts[name] for name in names), *consumed], dtype=torch.float64, device=device)
    total = all_reduce(local, dp)
    safe = nonzero(total.float())
    return StepTotals({name: safe[at] for at, name in enumerate(names)}, total[len(names) :])


def nonzero(totals: Tensor) -> Tensor:
    """1 in place of 0."""
    return torch.where(totals > 0, totals, torch.ones_like(totals))


def targets_of(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Everything an objective's loss reads, on `device`."""
    extras = {name: extra.values for name, extra in batch.extras.items()}
    named = {"labels": batch.labels, "loss_weight": batch.loss_weight, "segment_ids": batch.segment_ids, **extras}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in named.items()}


MakeContext = Callable[[Batch, Targets], LossContext]


def contexts(denominators: Mapping[str, Tensor], plan: ContextPlan) -> MakeContext:
    """(micro batch, its targets on the model's device) -> what its loss is told."""

    def context_of(batch: Batch, targets: Targets) -> LossContext:
        return LossContext(
            segment_ids=targets["segment_ids"],
            num_documents=batch.num_documents,
            denominators=denominators,
            extras={name: Extra(targets[name], extra.layout) for name, extra in batch.extras.items()},
            plan=plan,
        )

    return context_of


def part_of(batch: Batch, plan: ContextPlan) -> Batch:
    """This context rank's part of a batch: what has an entry per token is cut. The batch itself without context parallelism."""
    if plan.size == 1:
        return batch
    own = plan.own

    def cut(extra: Extra) -> Extra:
        return Extra(own(extra.values), extra.layout) if extra.layout is ExtraLayout.TOKEN else extra

    return replace(
        batch,
        tokens=own(batch.tokens),
        labels=own(batch.labels),
        loss_weight=own(batch.loss_weight),
        extras={name: cut(extra) for name, extra in batch.extras.items()},
    )


def with_aux(objective: Objective, share: float) -> ReadAny[LossTerms]:
    """The objective's loss, and what layers add to it (`Logits.aux`). share: 1 / micro batches of the step over all replicas"""

    def loss(logits: Logits, targets: Targets, context: LossContext) -> LossTerms:
        terms = objective.loss(logits, targets, context)
        if logits.aux is None:
            return terms
        aux = context.sum_ranks(logits.aux) * share
        return LossTerms(terms.loss + aux, {**terms.metrics, "aux_loss": Metric(aux, None)})

    return loss


LOSS = ""
"""Name of the loss itself among the sums."""

_UNEQUAL = 1e-4
"""A loss may differ that much between ranks that share a batch, as a share of it; they compute the same in the same order."""


class MetricSum:
    """Running sums and maxima of one step or one evaluation. Every added value is divided by its denominator at once.

    denominators: name -> scalar; of an evaluation, which does not know them before its end, none: then sums are divided in `reduce`
    """

    def __init__(self, denominators: Mapping[str, Tensor] | None = None) -> None:
        self._denominators = denominators
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}
        self._over: dict[str, str] = {}

    def add(self, terms: LossTerms) -> None:
        """Add what one micro batch contributes."""
        for name, metric in {LOSS: Metric(terms.loss, None), **terms.metrics}.items():
            value = metric.value.detach().float()
            if metric.maximum:
                self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value
                continue
            if metric.over is not None:
                self._over[name] = metric.over
                value = value if self._denominators is None else value / self._denominators[metric.over]
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def reduce(
        self, groups: Groups, device: torch.device, totals: Mapping[str, float] | None = None, **others: Tensor | None
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Metrics over all data ranks, the loss under LOSS; and `others` (equal on all ranks) on the host, in the same transfer.

        totals: what sums are divided by that were not divided when they were added
        The last pipeline stage, which alone sees the loss, tells all others.
        Raises TrainingError where ranks that share a batch made different losses of it.
        """
        names, maxima = sorted(self._sums), sorted(self._maxima)
        parts = []
        if names:
            sums = torch.stack([self._sums[name] for name in names])
            parts += [all_reduce(sums, groups.dp), _spread(sums, groups.cp)]
        if maxima:
            parts.append(all_reduce(torch.stack([self._maxima[name] for name in maxima]), groups.replicas, maximum=True))
        known = {name: value.detach().reshape(-1) for name, value in others.items() if value is not None}
        flat = iter(torch.cat([part.to(device, torch.float64) for part in (*parts, *known.values())] or [torch.zeros(0)]).tolist())
        metrics = dict(zip(names, islice(flat, len(names)), strict=True))
        spreads = zip(metrics.items(), islice(flat, len(names)), strict=True)
        unequal = [name or "loss" for (name, value), spread in spreads if spread > _UNEQUAL * max(1.0, abs(value))]
        if totals is not None:
            metrics = {name: value / (totals.get(self._over.get(name, ""), 1.0) or 1.0) for name, value in metrics.items()}
        metrics |= dict(zip(maxima, islice(flat, len(maxima)), strict=True))
        metrics, unequal = of_last_rank((metrics, unequal), groups.pp)
        if unequal:
            raise TrainingError(
                f"ranks that share the same sequences made different values of them: {', '.join(unequal)}",
                where="context_parallel_size, Objective.loss",
                fix="sum over tokens and documents by the context (sum_tokens, sum_documents, sum_ranks)",
            )
        return metrics, {name: list(islice(flat, value.numel())) for name, value in known.items()}


class Evaluation:
    """Metrics over a stream of micro batches, whose denominators are known at its end only.

    denominators: what to give the objective: 1 for each name
    """

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self.denominators: dict[str, Tensor] = {}
        self._objective = objective
        self._device = device
        self._meter = MetricSum()
        self._counts: Counter[str] = Counter()

    def counted(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, unchanged; they are of whole rows."""
        for batch in batches:
            counts = count(self._objective, [batch])
            self._counts.update(counts)
            self.denominators |= {name: torch.ones((), device=self._device) for name in counts}
            yield batch

    def read(self, logits: Logits, targets: Targets, context: LossContext) -> None:
        """Add what one micro batch contributes."""
        self._meter.add(self._objective.loss(logits, targets, context))

    def metrics(self, groups: Groups) -> dict[str, float]:
        """Over all data ranks; the same on every rank."""
        names = sorted(self._counts)
        own = torch.tensor([self._counts[name] for name in names], dtype=torch.float64, device=self._device)
        totals = dict(zip(names, all_reduce(own, groups.dp).tolist(), strict=True))
        metrics, _ = self._meter.reduce(groups, self._device, totals)
        return {name: value for name, value in metrics.items() if name != LOSS}


def _spread(sums: Tensor, group: Group) -> Tensor:
    """Largest difference between the ranks of the group, of each sum."""
    if group.size == 1:
        return torch.zeros_like(sums)
    return all_reduce(torch.stack([sums, -sums]), group, maximum=True).sum(dim=0)


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

    It shows that a resumed run, also at another number of ranks, takes the samples that one run would have taken.
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
