# SPDX-License-Identifier: Apache-2.0
"""The engine: steps, evaluation, save and load around one way of running micro batches."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron.checkpoint.saving.write import RankFileWriter
from megatron.data.batch import Batch
from megatron.engine.base import LocalShards, StepResult
from megatron.engine.deepspeed_runner import Runner
from megatron.engine.loss_normalization import MetricSum, global_denominator, part_of, require_same_batch, tokens_digest, weighted_mean
from megatron.engine.timers import Timers
from megatron.log import get_logger
from megatron.model.spec import ModelSpec
from megatron.mpu.context import ContextPlan
from megatron.objectives.base import Objective

log = get_logger(__name__)


class ComputePath(Protocol):
    """How micro batches run: SequentialPath or PipelinePath."""

    def step(self, objective: Objective, micro_batches: Sequence[Batch], denominator: Tensor, meter: MetricSum) -> None:
        """One optimizer step."""

    def evaluate(self, objective: Objective, micro_batches: Iterable[Batch], meter: MetricSum) -> None:
        """Add the metrics of all micro batches, without a step and with denominator 1, to `meter`."""


class TrainEngine:
    """An `Engine` (see engine/base.py) on DeepSpeed.

    context: how a batch's sequences are spread over ranks
    """

    def __init__(
        self, runner: Runner, path: ComputePath, device: torch.device, timers: Timers | None = None, context: ContextPlan | None = None
    ) -> None:
        self.runner = runner
        self.context = ContextPlan() if context is None else context
        self.timers = timers or Timers()
        self.groups = runner.groups
        self.device = device
        self._path = path

    def train_step(self, objective: Objective, micro_batches: Sequence[Batch]) -> StepResult:
        """One optimizer step over this data rank's micro batches."""
        started = time.perf_counter()
        groups = self.groups
        learning_rate = self.runner.learning_rate
        if log.isEnabledFor(logging.DEBUG):
            require_same_batch(micro_batches, groups)
            log.debug("tokens of the step: %s", tokens_digest(micro_batches, groups.dp))
        denominator = global_denominator(objective, micro_batches, groups.dp, self.device)
        meter = MetricSum()
        self.module().train()
        self._path.step(objective, [part_of(batch, self.context) for batch in micro_batches], denominator, meter)
        metrics, others = meter.reduce(groups, self.device, grad_norm=self.runner.grad_norm)
        samples = sum(batch.tokens.shape[0] for batch in micro_batches) * groups.dp.size
        return StepResult(
            metrics=metrics,
            learning_rate=learning_rate,
            grad_norm=others.get("grad_norm"),
            loss_scale=self.runner.loss_scale,
            skipped=self.runner.step_was_skipped,
            not_finite=self.runner.not_finite,
            seconds=time.perf_counter() - started,
            samples=samples,
            tokens=samples * micro_batches[0].tokens.shape[1],
            timings=self.timers.take(),
        )

    def eval_step(self, objective: Objective, micro_batches: Iterable[Batch]) -> Mapping[str, float]:
        """Metrics over a stream of micro batches, weighted by what each of them trains; sums over all data ranks."""
        self.module().eval()
        meter = MetricSum()
        trained = 0.0

        def parts() -> Iterator[Batch]:
            nonlocal trained
            for batch in micro_batches:
                trained += objective.denominator(batch)
                yield part_of(batch, self.context)

        self._path.evaluate(objective, parts(), meter)
        metrics = weighted_mean(meter, trained, self.groups, self.device)
        self.module().train()
        return metrics

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
