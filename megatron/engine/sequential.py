# SPDX-License-Identifier: Apache-2.0
"""How micro batches run without a pipeline (`pipe_parallel_size: 0`): forward and backward, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch

from megatron import fault_injection
from megatron.data.batch import Batch
from megatron.engine.deepspeed_runner import Runner
from megatron.engine.fault_injection import disturbed
from megatron.engine.loss_normalization import MakeContext, MetricSum, targets_of, with_aux
from megatron.engine.timers import Timers
from megatron.objectives.base import Objective, ReadAny

T = TypeVar("T")


class SequentialPath:
    """A plain module under DeepSpeed's engine. The loss is formed inside the head's forward, as ZeRO-3 needs it."""

    def __init__(self, runner: Runner, device: torch.device, timers: Timers | None = None) -> None:
        self._runner = runner
        self._device = device
        self._timers = timers or Timers()

    def step(self, objective: Objective, micro_batches: Sequence[Batch], contexts: MakeContext, meter: MetricSum) -> None:
        """One optimizer step; adds the metrics of every micro batch to `meter`."""
        engine = self._runner.deepspeed
        self._runner.set_micro_batches(len(micro_batches))
        loss = with_aux(objective, 1.0 / (len(micro_batches) * self._runner.groups.replicas.size))
        for number, batch in enumerate(micro_batches, start=1):
            fault_injection.point("micro_batch")
            engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            with self._timers("forward"):
                terms = disturbed(self._read(engine, batch, loss, contexts))
                meter.add(terms)
                self._runner.guard.see(terms.loss)
            with self._timers("backward"):
                # DeepSpeed averages gradients over replicas; the denominators have divided by the whole batch already. The product must be
                # made on one rank, too: on the very tensor that forward returned, DeepSpeed would divide by the accumulation steps.
                engine.backward(terms.loss * self._runner.groups.replicas.size, scale_wrt_gas=False)
            with self._timers("optimizer"):
                engine.step()

    def infer(self, micro_batches: Iterable[Batch], read: ReadAny[T], contexts: MakeContext) -> list[T]:
        """What `read` gives for each micro batch, without gradient."""
        model = self._runner.deepspeed.module
        with torch.no_grad():
            return [self._read(model, batch, read, contexts) for batch in micro_batches]

    def _read(self, model: Any, batch: Batch, read: ReadAny[T], contexts: MakeContext) -> T:
        targets = targets_of(batch, self._device)
        context = contexts(batch, targets)
        tokens = batch.tokens.to(self._device, non_blocking=True)
        found: T = model(tokens, targets["segment_ids"], read=lambda logits: read(logits, targets, context))
        return found
