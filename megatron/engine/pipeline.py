# SPDX-License-Identifier: Apache-2.0
"""How micro batches run through a pipeline (`pipe_parallel_size` >= 1): DeepSpeed's schedule over the same plan."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron import fault_injection
from megatron.data.batch import Batch
from megatron.engine.deepspeed_runner import Runner
from megatron.engine.fault_injection import disturbed
from megatron.engine.loss_normalization import MakeContext, MetricSum, targets_of, with_aux
from megatron.engine.timers import Timers
from megatron.errors import TrainingError
from megatron.objectives.base import LossContext, Objective, ReadAny, Targets

T = TypeVar("T")
OnLogits = Callable[[Any, Targets, LossContext], Tensor]
"""(head's handle, targets, context) of one micro batch -> scalar."""


class LossOfStep:
    """The `loss_fn` handed to the pipeline module: called with the head's handle of one micro batch after the other, in their order."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Targets, LossContext]] = deque()
        self._call: OnLogits | None = None

    def __call__(self, logits: Any, labels: object) -> Tensor:
        """Loss of one micro batch. labels: DeepSpeed's copy of something that is here already"""
        if self._call is None or not self._waiting:
            raise TrainingError("the pipeline ran outside a step", fix="call train_step, eval_step or score")
        return self._call(logits, *self._waiting.popleft())

    @contextmanager
    def during(self, call: OnLogits, inputs: Iterable[tuple[Targets, LossContext]]) -> Iterator[None]:
        """Have `call` make the losses of these micro batches."""
        self._call, self._waiting = call, deque(inputs)
        try:
            yield
        finally:
            self._call, self._waiting = None, deque()


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

    def step(self, objective: Objective, micro_batches: Sequence[Batch], contexts: MakeContext, meter: MetricSum) -> None:
        """One optimizer step; adds the metrics of every micro batch to `meter`."""
        runner = self._runner
        # Undoes DeepSpeed's division by accumulation steps and data ranks.
        factor = float(len(micro_batches) * runner.groups.replicas.size)

        loss_terms = with_aux(objective, 1.0 / factor)

        def loss_of(logits: Any, targets: Targets, context: LossContext) -> Tensor:
            fault_injection.point("micro_batch")
            terms = disturbed(loss_terms(logits, targets, context))
            runner.guard.see(terms.loss)
            meter.add(terms)
            loss = terms.loss * factor
            loss.register_hook(lambda grad: runner.begin_backward())
            return loss

        inputs = [self._inputs(batch, contexts) for batch in micro_batches]
        with self._loss.during(loss_of, inputs), self._timers("train_batch"):
            self._fit_buffers(micro_batches[0].tokens)
            runner.set_micro_batches(len(micro_batches))
            runner.deepspeed.train_batch(data_iter=rows_of(micro_batches, inputs))

    def infer(self, micro_batches: Iterable[Batch], read: ReadAny[T], contexts: MakeContext) -> list[T]:
        """What `read` gives for each micro batch, without gradient, on the last stage. Stages work on several micro batches at a time."""
        found: list[T] = []

        def keep(logits: Any, targets: Targets, context: LossContext) -> Tensor:
            fault_injection.point("micro_batch")
            found.append(read(logits, targets, context))
            return torch.zeros((), device=self._device)

        batches = iter(micro_batches)
        while group := list(islice(batches, self._runner.groups.pp.size * 2)):
            inputs = [self._inputs(batch, contexts) for batch in group]
            with self._loss.during(keep, inputs):
                self._fit_buffers(group[0].tokens)
                rows = rows_of(group, inputs)
                self._runner.deepspeed.eval_batch(rows, reduce_output=None, bcast_loss=False, num_micro_batches=len(group))
        return found

    def _inputs(self, batch: Batch, contexts: MakeContext) -> tuple[Targets, LossContext]:
        targets = targets_of(batch, self._device)
        return targets, contexts(batch, targets)

    def _fit_buffers(self, tokens: Tensor) -> None:
        """What stages send to each other has the shape of the first micro batch; forget that where another one comes."""
        if self._shape not in (None, tuple(tokens.shape)):
            self._runner.deepspeed.reset_activation_shape()
        self._shape = tuple(tokens.shape)


def rows_of(
    micro_batches: Sequence[Batch], inputs: Sequence[tuple[Targets, LossContext]]
) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]]:
    """Micro batches in the form that DeepSpeed wants: (input of the first stage, labels of the last)."""
    for batch, (targets, _) in zip(micro_batches, inputs, strict=True):
        yield (batch.tokens, targets["segment_ids"]), (targets["labels"],)
