# SPDX-License-Identifier: Apache-2.0
"""The engine: steps, evaluation, save and load around one way of running micro batches."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from megatron.checkpoint.steps.write import RankFileWriter
from megatron.data.batch import Batch
from megatron.engine.base import LocalShards, StepResult
from megatron.engine.deepspeed_runner import Runner
from megatron.engine.loss_normalization import (
    LOSS,
    Evaluation,
    MetricSum,
    contexts,
    part_of,
    require_same_batch,
    step_totals,
    tokens_digest,
)
from megatron.engine.micro_batches import ComputePath, Timers
from megatron.log import get_logger
from megatron.model.spec import ModelSpec
from megatron.mpu.collectives import of_last_rank
from megatron.mpu.comm import all_reduce
from megatron.mpu.context import ContextPlan
from megatron.objectives.base import Objective, Read, ReadAny

log = get_logger(__name__)
T = TypeVar("T")


class TrainEngine:
    """An `Engine` (see engine/base.py) on DeepSpeed.

    context: how a batch's sequences are cut over ranks
    """

    def __init__(self, runner: Runner, path: ComputePath, device: torch.device, timers: Timers, context: ContextPlan) -> None:
        self.runner = runner
        self.context = context
        self.timers = timers
        self.groups = runner.groups
        self.device = device
        self._path = path

    def train_step(self, objective: Objective, micro_batches: Sequence[Batch]) -> StepResult:
        """One optimizer step over this data rank's micro batches, as many as there are."""
        started = time.perf_counter()
        groups = self.groups
        learning_rate = self.runner.learning_rate
        if log.isEnabledFor(logging.DEBUG):
            require_same_batch(micro_batches, groups)
            log.debug("tokens of the step: %s", tokens_digest(micro_batches, groups.dp))
        micro_batches = objective.prepare(micro_batches, self)
        totals = step_totals(objective, micro_batches, groups.dp, self.device)
        meter = MetricSum(totals.denominators)
        self.module().train()
        self._path.step(
            objective, [part_of(batch, self.context) for batch in micro_batches], contexts(totals.denominators, self.context), meter
        )
        metrics, others = meter.reduce(groups, self.device, consumed=totals.consumed, grad_norm=self.runner.grad_norm)
        samples, tokens, padding = (int(value) for value in others["consumed"])
        return StepResult(
            loss=metrics.pop(LOSS),
            metrics=metrics,
            learning_rate=learning_rate,
            grad_norm=others["grad_norm"][0] if "grad_norm" in others else None,
            loss_scale=self.runner.loss_scale,
            skipped=self.runner.step_was_skipped,
            not_finite=self.runner.not_finite,
            seconds=time.perf_counter() - started,
            samples=samples,
            tokens=tokens,
            padding=padding,
            timings=self.timers.take(),
        )

    def eval_step(self, objective: Objective, micro_batches: Iterable[Batch]) -> Mapping[str, float]:
        """Metrics over all micro batches of all data ranks, without gradients; the same on every rank."""
        evaluation = Evaluation(objective, self.device)
        prepared = (batch for drawn in micro_batches for batch in objective.prepare([drawn], self))
        self._infer(evaluation.counted(prepared), evaluation.read, evaluation.denominators)
        return evaluation.metrics(self.groups)

    def score(self, batches: Iterable[Batch], read: Read) -> list[Tensor]:
        """What `read` gives for each batch, on the CPU of every rank that has the batch."""
        found = self._infer(batches, read, {})
        return of_last_rank([values.cpu() for values in found], self.groups.pp)

    def sum_over_data(self, values: Tensor) -> Tensor:
        """Sum over the data ranks."""
        return all_reduce(values.to(self.device), self.groups.dp).to(values.device)

    def _infer(self, batches: Iterable[Batch], read: ReadAny[T], denominators: Mapping[str, Tensor]) -> list[T]:
        module = self.module()
        training = module.training
        module.eval()
        try:
            return self._path.infer((part_of(batch, self.context) for batch in batches), read, contexts(denominators, self.context))
        finally:
            module.train(training)

    def save(self, directory: Path, tag: str, client_state: Mapping[str, Any], writing: RankFileWriter) -> None:
        """Hand weights and optimizer, as files of directory/tag, to `writing`, which is waited for."""
        self.runner.save(directory, tag, client_state, writing)

    def load(self, directory: Path, tag: str, spec: ModelSpec) -> dict[str, Any]:
        """Read weights, optimizer and schedule, of any layout; returns the client state."""
        return self.runner.load(directory, tag, spec)

    def set_schedule_step(self, steps: int, saved: Mapping[str, Any] | None = None) -> None:
        """Move the learning-rate schedule to where `steps` optimizer steps have been made; `saved` is the checkpoint's schedule."""
        self.runner.schedule.seek(steps, saved)

    def module(self) -> nn.Module:
        """The model (this stage of it)."""
        module: nn.Module = self.runner.deepspeed.module
        return module

    def local_shards(self) -> LocalShards:
        """What of each parameter is on this rank."""
        return self.runner.local_shards()

    def before_update(self, look: Callable[[], None]) -> None:
        """Have `look` called on every rank just before each optimizer update, when the gradients are complete."""
        self.runner.watch(look)
