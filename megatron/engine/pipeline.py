# SPDX-License-Identifier: Apache-2.0
"""How micro batches run through a pipeline (`pipe_parallel_size` >= 1): DeepSpeed's schedule over the same plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from megatron import fault_injection
from megatron.data.batch import Batch
from megatron.engine.deepspeed_runner import Runner
from megatron.engine.fault_injection import disturbed
from megatron.engine.loss_normalization import MetricSum, targets_of, with_aux
from megatron.engine.timers import Timers
from megatron.errors import TrainingError
from megatron.objectives.base import Objective


@dataclass(frozen=True)
class _Step:
    """What the loss function of the last stage needs to know about the step under way."""

    objective: Objective
    denominator: Tensor
    names: tuple[str, ...]
    meter: MetricSum
    factor: float = 1.0
    aux_share: float = 0.0
    see: Callable[[Tensor], None] = lambda loss: None
    before_backward: Callable[[], None] = lambda: None


class LossOfStep:
    """The `loss_fn` handed to the pipeline module: (head's handle, targets in order) -> scalar."""

    def __init__(self) -> None:
        self.current: _Step | None = None

    def __call__(self, logits: Any, targets: Sequence[Tensor]) -> Tensor:
        """Loss of one micro batch, scaled so that DeepSpeed's division by accumulation steps and data ranks is undone."""
        if self.current is None:
            raise TrainingError("the pipeline ran outside a step", fix="call train_step or eval_step")
        fault_injection.point("micro_batch")
        step = self.current
        terms = step.objective.loss(logits, dict(zip(step.names, targets, strict=True)), step.denominator)
        terms = with_aux(terms, logits.aux, step.aux_share)
        if terms.loss.requires_grad:
            terms = disturbed(terms)
            step.see(terms.loss)
        step.meter.add(terms.metrics)
        loss = terms.loss * step.factor
        if loss.requires_grad:
            loss.register_hook(lambda grad: step.before_backward())
        return loss


class PipelinePath:
    """The plan as a DeepSpeed PipelineModule; one optimizer step is one `train_batch`.

    The objective runs on the last stage alone, and adds its metrics there.
    """

    def __init__(self, runner: Runner, loss_of_step: LossOfStep, device: torch.device, timers: Timers | None = None) -> None:
        self._runner = runner
        self._timers = timers or Timers()
        self._loss = loss_of_step
        self._device = device
        self._shape: tuple[int, ...] | None = None

    def step(self, objective: Objective, micro_batches: Sequence[Batch], denominator: Tensor, meter: MetricSum) -> None:
        """One optimizer step; adds the metrics of every micro batch to `meter`."""
        prepared = [(batch.tokens, targets_of(batch, self._device)) for batch in micro_batches]
        factor = float(len(micro_batches) * self._runner.groups.replicas.size)
        step = _Step(
            objective, denominator, tuple(prepared[0][1]), meter, factor, 1.0 / factor, self._runner.guard.see, self._runner.begin_backward
        )
        with self._during(step), self._timers("train_batch"):
            self._fit_buffers(prepared[0][0])
            self._runner.deepspeed.train_batch(data_iter=iter(rows_of(prepared)))

    def evaluate(self, objective: Objective, micro_batches: Iterable[Batch], meter: MetricSum) -> None:
        """Add the metrics of all micro batches to `meter`. Stages work on several micro batches at a time."""
        one = torch.ones((), dtype=torch.float32, device=self._device)
        batches = iter(micro_batches)
        while group := list(islice(batches, self._runner.groups.pp.size * 2)):
            prepared = [(batch.tokens, targets_of(batch, self._device)) for batch in group]
            with self._during(_Step(objective, one, tuple(prepared[0][1]), meter)):
                self._fit_buffers(prepared[0][0])
                self._runner.deepspeed.eval_batch(
                    iter(rows_of(prepared)), reduce_output=None, bcast_loss=False, num_micro_batches=len(group)
                )

    @contextmanager
    def _during(self, step: _Step) -> Iterator[None]:
        self._loss.current = step
        try:
            yield
        finally:
            self._loss.current = None

    def _fit_buffers(self, tokens: Tensor) -> None:
        """What stages send to each other has the shape of the first micro batch; forget that where another one comes."""
        if self._shape not in (None, tuple(tokens.shape)):
            self._runner.deepspeed.reset_activation_shape()
        self._shape = tuple(tokens.shape)


def rows_of(prepared: Sequence[tuple[Tensor, Mapping[str, Tensor]]]) -> list[tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]]:
    """Micro batches in the form that DeepSpeed wants: (input of the first stage, targets of the last)."""
    return [((tokens, targets["segment_ids"]), tuple(targets.values())) for tokens, targets in prepared]
