# SPDX-License-Identifier: Apache-2.0
"""How micro batches run without a pipeline (`pipe_parallel_size: 0`): forward and backward, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron import fault_injection
from megatron.data.batch import Batch
from megatron.engine.deepspeed_runner import Runner
from megatron.engine.fault_injection import disturbed
from megatron.engine.loss_normalization import MetricSum, add_terms, targets_of, with_aux
from megatron.engine.timers import Timers
from megatron.objectives.base import LossTerms, Objective


class SequentialPath:
    """A plain module under DeepSpeed's engine. The loss is formed inside the head's forward, as ZeRO-3 needs it."""

    def __init__(self, runner: Runner, device: torch.device, timers: Timers | None = None) -> None:
        self._runner = runner
        self._device = device
        self._timers = timers or Timers()

    def step(self, objective: Objective, micro_batches: Sequence[Batch], denominator: Tensor, meter: MetricSum) -> None:
        """One optimizer step; adds the metrics of every micro batch to `meter`."""
        engine = self._runner.deepspeed
        share = 1.0 / (len(micro_batches) * self._runner.groups.replicas.size)
        for batch in micro_batches:
            fault_injection.point("micro_batch")
            with self._timers("forward"):
                terms = disturbed(self._terms(engine, objective, batch, denominator, share))
                meter.add(terms.metrics)
                self._runner.guard.see(terms.loss)
            with self._timers("backward"):
                # DeepSpeed averages gradients over replicas; the denominator has divided by the whole batch already. The product must be
                # made on one rank, too: on the very tensor that forward returned, DeepSpeed would divide by the accumulation steps.
                engine.backward(terms.loss * self._runner.groups.replicas.size, scale_wrt_gas=False)
            with self._timers("optimizer"):
                engine.step()

    def evaluate(self, objective: Objective, micro_batches: Iterable[Batch], meter: MetricSum) -> None:
        """Add the metrics of all micro batches to `meter`."""

        def terms(objective: Objective, batch: Batch, denominator: Tensor) -> LossTerms:
            return self._terms(self._runner.deepspeed.module, objective, batch, denominator, aux_share=0.0)

        add_terms(objective, micro_batches, terms, meter, self._device)

    def _terms(self, model: Any, objective: Objective, batch: Batch, denominator: Tensor, aux_share: float) -> LossTerms:
        targets = targets_of(batch, self._device)
        terms: LossTerms = model(
            batch.tokens.to(self._device, non_blocking=True),
            targets["segment_ids"],
            read=lambda logits: with_aux(objective.loss(logits, targets, denominator), logits.aux, aux_share),
        )
        return terms
