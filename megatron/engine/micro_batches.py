# SPDX-License-Identifier: Apache-2.0
"""How the micro batches of a step run, one after the other or through DeepSpeed's pipeline, and the seconds that their phases take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron import deepspeed_private as private
from megatron import fault_injection
from megatron.data.batch import Batch
from megatron.engine.deepspeed_runner import Runner
from megatron.engine.loss_normalization import MakeContext, MetricSum, targets_of, with_aux
from megatron.errors import TrainingError
from megatron.objectives.base import LossContext, LossTerms, Objective, ReadAny, Targets

T = TypeVar("T")


class Timers:
    """Sums seconds by name; does nothing, and waits for no device, unless `enabled`.

    >>> clock = iter([1.0, 3.0, 5.0, 6.0, 7.0, 7.0])
    >>> timers = Timers(enabled=True, clock=lambda: next(clock))
    >>> with timers("forward"): pass
    >>> list(timers.over("batch generator", iter("a"))), timers.take(), timers.take()
    (['a'], {'forward': 2.0, 'batch generator': 1.0}, {})
    """

    def __init__(
        self, device: torch.device | None = None, *, enabled: bool = False, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.enabled = enabled
        self._device = device
        self._clock = clock
        self._sums: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time the body takes. The device is waited for on both sides, so that its work counts where it was asked for."""
        if not self.enabled:
            yield
            return
        started = self._now()
        yield
        self._sums[name] = self._sums.get(name, 0.0) + self._now() - started

    def over(self, name: str, items: Iterator[T]) -> Iterator[T]:
        """`items`, with the time that each of them takes to come."""
        while True:
            with self(name):
                item = next(items, None)
            if item is None:
                return
            yield item

    def take(self) -> dict[str, float]:
        """Name -> seconds since the last call."""
        sums, self._sums = self._sums, {}
        return sums

    def _now(self) -> float:
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()


class ComputePath:
    """How micro batches run: SequentialPath or PipelinePath."""

    def __init__(self, runner: Runner, device: torch.device, timers: Timers) -> None:
        self._runner = runner
        self._device = device
        self._timers = timers

    def step(self, objective: Objective, micro_batches: Sequence[Batch], contexts: MakeContext, meter: MetricSum) -> None:
        """One optimizer step; adds the loss and metrics of every micro batch to `meter`."""
        raise NotImplementedError

    def infer(self, micro_batches: Iterable[Batch], read: ReadAny[T], contexts: MakeContext) -> list[T]:
        """What `read` gives for each micro batch, without gradient; nothing on stages before the last."""
        raise NotImplementedError

    def _inputs(self, batch: Batch, contexts: MakeContext) -> tuple[Targets, LossContext]:
        targets = targets_of(batch, self._device)
        return targets, contexts(batch, targets)

    def _noted(self, terms: LossTerms, meter: MetricSum) -> LossTerms:
        """The loss of one micro batch, told to `meter` and to the guard; a fault plan may change it first (site `loss`)."""
        factor = fault_injection.changed("loss", 1.0)
        if factor != 1.0:
            metrics = {name: metric._replace(value=metric.value * factor) for name, metric in terms.metrics.items()}
            terms = LossTerms(loss=terms.loss * factor, metrics=metrics)
        meter.add(terms)
        self._runner.guard.see(terms.loss)
        return terms


class SequentialPath(ComputePath):
    """A plain module under DeepSpeed's engine (`pipe_parallel_size: 0`): forward and backward, one micro batch after the other.

    The loss is formed inside the head's forward, as ZeRO-3 needs it.
    """

    def step(self, objective: Objective, micro_batches: Sequence[Batch], contexts: MakeContext, meter: MetricSum) -> None:
        """One optimizer step; adds the loss and metrics of every micro batch to `meter`."""
        engine, replicas = self._runner.deepspeed, self._runner.groups.replicas.size
        private.set_micro_batches(self._runner.deepspeed, len(micro_batches))
        loss = with_aux(objective, 1.0 / (len(micro_batches) * replicas))
        for number, batch in enumerate(micro_batches, start=1):
            fault_injection.point("micro_batch")
            engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            with self._timers("forward"):
                terms = self._noted(self._read(engine, batch, loss, contexts), meter)
            with self._timers("backward"):
                # DeepSpeed averages gradients over replicas; the denominators have divided by the whole batch already. The product must be
                # made on one rank, too: on the very tensor that forward returned, DeepSpeed would divide by the accumulation steps.
                engine.backward(terms.loss * replicas, scale_wrt_gas=False)
            with self._timers("optimizer"):
                engine.step()

    def infer(self, micro_batches: Iterable[Batch], read: ReadAny[T], contexts: MakeContext) -> list[T]:
        """What `read` gives for each micro batch, without gradient."""
        model = self._runner.deepspeed.module
        with torch.no_grad():
            return [self._read(model, batch, read, contexts) for batch in micro_batches]

    def _read(self, model: Any, batch: Batch, read: ReadAny[T], contexts: MakeContext) -> T:
        targets, context = self._inputs(batch, contexts)
        tokens = batch.tokens.to(self._device, non_blocking=True)
        found: T = model(tokens, targets["segment_ids"], read=lambda logits: read(logits, targets, context))
        return found


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


class PipelinePath(ComputePath):
    """The plan as a DeepSpeed PipelineModule (`pipe_parallel_size` >= 1); one optimizer step is one `train_batch`.

    The objective runs on the last stage alone, and adds its metrics there.
    """

    def __init__(self, runner: Runner, loss_of_step: LossOfStep, device: torch.device, timers: Timers) -> None:
        super().__init__(runner, device, timers)
        self._loss = loss_of_step
        self._shape: tuple[int, ...] | None = None

    def step(self, objective: Objective, micro_batches: Sequence[Batch], contexts: MakeContext, meter: MetricSum) -> None:
        """One optimizer step; adds the loss and metrics of every micro batch to `meter`."""
        # Undoes DeepSpeed's division by accumulation steps and data ranks.
        factor = float(len(micro_batches) * self._runner.groups.replicas.size)
        loss_terms = with_aux(objective, 1.0 / factor)

        def loss_of(logits: Any, targets: Targets, context: LossContext) -> Tensor:
            fault_injection.point("micro_batch")
            loss = self._noted(loss_terms(logits, targets, context), meter).loss * factor
            loss.register_hook(lambda grad: private.begin_backward(self._runner.deepspeed))
            return loss

        with self._rows(micro_batches, contexts, loss_of) as rows, self._timers("train_batch"):
            private.set_micro_batches(self._runner.deepspeed, len(micro_batches))
            self._runner.deepspeed.train_batch(data_iter=rows)

    def infer(self, micro_batches: Iterable[Batch], read: ReadAny[T], contexts: MakeContext) -> list[T]:
        """What `read` gives for each micro batch, without gradient, on the last stage. Stages work on several micro batches at a time."""
        found: list[T] = []

        def keep(logits: Any, targets: Targets, context: LossContext) -> Tensor:
            fault_injection.point("micro_batch")
            found.append(read(logits, targets, context))
            return torch.zeros((), device=self._device)

        batches = iter(micro_batches)
        while group := list(islice(batches, self._runner.groups.pp.size * 2)):
            with self._rows(group, contexts, keep) as rows:
                self._runner.deepspeed.eval_batch(rows, reduce_output=None, bcast_loss=False, num_micro_batches=len(group))
        return found

    @contextmanager
    def _rows(
        self, micro_batches: Sequence[Batch], contexts: MakeContext, call: OnLogits
    ) -> Iterator[Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor]]]]:
        """Micro batches as DeepSpeed wants them: (input of the first stage, labels of the last). Within, `call` makes the losses."""
        inputs = [self._inputs(batch, contexts) for batch in micro_batches]
        # What stages send to each other has the shape of the first micro batch; forget that where another one comes.
        shape = tuple(micro_batches[0].tokens.shape)
        if self._shape not in (None, shape):
            self._runner.deepspeed.reset_activation_shape()
        self._shape = shape
        pairs = zip(micro_batches, inputs, strict=True)
        with self._loss.during(call, inputs):
            yield (((batch.tokens, targets["segment_ids"]), (targets["labels"],)) for batch, (targets, _) in pairs)
