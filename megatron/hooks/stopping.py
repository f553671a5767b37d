# SPDX-License-Identifier: Apache-2.0
"""What ends a run before its last iteration: an interval, a time limit, a signal, or numbers that are none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime

from megatron.engine.base import Engine, StepResult
from megatron.errors import TrainingError
from megatron.hooks.agreement import Stopping
from megatron.hooks.base import BaseHook, TrainState, Verdict
from megatron.log import get_logger
from megatron.progress import format_exit

log = get_logger(__name__)


class StopHook(BaseHook):
    """Answers STOP at a step boundary on which all ranks agree. Must be the last hook that acts on steps.

    exit_interval: stop after iterations that are a multiple of it
    stopping:      signals and time limits of all ranks
    reason:        why the run stops; None while it goes on
    """

    def __init__(self, *, rank: int = 0, exit_interval: int | None = None, stopping: Stopping | None = None) -> None:
        self.rank = rank
        self.exit_interval = exit_interval
        self.stopping = stopping or Stopping()
        self.reason: str | None = None

    def on_start(self, state: TrainState, engine: Engine) -> None:
        """The clock of the run begins."""
        self.stopping.begin()

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """STOP when any rank has a reason to."""
        self.stopping.note_step(result.seconds)
        if self.stopping.agreed():
            self.reason = self.stopping.reason
        elif self.exit_interval and state.iteration % self.exit_interval == 0:
            self.reason = f"exit_interval {self.exit_interval}"
        if self.reason is None or state.iteration >= state.target:
            return Verdict.CONTINUE
        log.info(f"stopping after this step: {self.reason}")
        log.info(format_exit(self.rank, state.iteration, datetime.now()))
        return Verdict.STOP


class FiniteHook(BaseHook):
    """Ends the run when its loss or gradient is not finite, or when fp16 steps are skipped without end.

    max_skipped: steps in a row that may be skipped; a few are how a loss scale is found
    """

    def __init__(self, *, max_skipped: int = 50) -> None:
        self.max_skipped = max_skipped
        self._skipped = 0

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """Raise TrainingError; every rank sees the same numbers, so all raise together."""
        self._skipped = self._skipped + 1 if result.skipped else 0
        if self._skipped >= self.max_skipped:
            raise TrainingError(
                f"the last {self._skipped} steps overflowed in fp16 and were skipped (loss scale {result.loss_scale})",
                where=f"iteration {state.iteration}",
                mend="use bfloat16, or a lower learning rate",
            )
        if result.skipped:
            return Verdict.CONTINUE
        bad = not_finite(result.metrics, result.grad_norm)
        if bad:
            raise TrainingError(
                f"not finite: {bad}",
                where=f"iteration {state.iteration}",
                mend="resume from the last checkpoint with a lower lr, a longer warmup or a smaller gradient_clipping, "
                "and look at this step's data",
            )
        return Verdict.CONTINUE


def not_finite(metrics: Mapping[str, float], grad_norm: float | None) -> str:
    """`name = value` of the losses and the gradient norm that are not finite, joined; empty when all is well."""
    watched = {name: value for name, value in metrics.items() if name == "lm_loss" or "lm_loss" not in metrics}
    if grad_norm is not None:
        watched["grad_norm"] = grad_norm
    return ", ".join(f"{name} = {value}" for name, value in watched.items() if not math.isfinite(value))
