# SPDX-License-Identifier: Apache-2.0
"""How micro batches run through a pipeline (`pipe_parallel_size` >= 1): DeepSpeed's schedule over the same plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.data.batch import Batch
from megatron.engine.accounting import MetricSum, targets_of
from megatron.engine.deepspeed_runner import Runner
from megatron.engine.timers import Timers
from megatron.errors import TrainingError
from megatron.objectives.base import LossTerms, Objective


@dataclass(frozen=True)
class _Step:
    """What the loss function of the last stage needs to know about the step under way."""

    objective: Objective
    denominator: Tensor
    names: tuple[str, ...]
    factor: float
    meter: MetricSum
    before_backward: Callable[[], None]


class LossOfStep:
    """The `loss_fn` handed to the pipeline module: (head's handle, targets in order) -> scalar."""

    def __init__(self) -> None:
        self.current: _Step | None = None

    def __call__(self, logits: Any, targets: Sequence[Tensor]) -> Tensor:
        """Loss of one micro batch, scaled so that DeepSpeed's division by accumulation steps and data ranks is undone."""
        if self.current is None:
            raise TrainingError("the pipeline ran outside a step", mend="call train_step or eval_step")
        step = self.current
        terms = step.objective.loss(logits, dict(zip(step.names, targets, strict=True)), step.denominator)
        step.meter.add(terms.metrics)
        loss = terms.loss * step.factor
        if loss.requires_grad:
            loss.register_hook(lambda grad: step.before_backward())
        return loss


class PipelinePath:
    """The plan as a DeepSpeed PipelineModule; one optimizer step is one `train_batch`."""

    def __init__(self, runner: Runner, loss_of_step: LossOfStep, device: torch.device, timers: Timers | None = None) -> None:
        self._runner = runner
        self._timers = timers or Timers()
        self._loss = loss_of_step
        self._device = device

    def step(self, objective: Objective, micro_batches: Sequence[Batch], denominator: Tensor, meter: MetricSum) -> None:
        """One optimizer step; adds the metrics of every micro batch to `meter`."""
        prepared = [(batch.tokens, targets_of(batch, self._device)) for batch in micro_batches]
        factor = float(len(micro_batches) * self._runner.groups.dp.size)
        self._loss.current = _Step(objective, denominator, tuple(prepared[0][1]), factor, meter, self._runner.begin_backward)
        try:
            rows = [((tokens, targets["segments"]), tuple(targets.values())) for tokens, targets in prepared]
            with self._timers("train_batch"):
                self._runner.deepspeed.train_batch(data_iter=iter(rows))
        finally:
            self._loss.current = None

    def terms(self, objective: Objective, batch: Batch, denominator: Tensor) -> LossTerms:
        """Loss and metrics of one micro batch, for evaluation (the whole model is on this stage)."""
        targets = targets_of(batch, self._device)
        logits = self._runner.deepspeed.module((batch.tokens.to(self._device), targets["segments"]))
        return objective.loss(logits, targets, denominator)
