# SPDX-License-Identifier: Apache-2.0
"""When a checkpoint is written, and what follows checkpoints: uploads, exports, and a look at whose folder it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron import fault_injection
from megatron.engine.base import Engine, StepResult
from megatron.hooks.base import Hook, TrainState, Verdict
from megatron.hooks.norms import Send as Report

if TYPE_CHECKING:
    from megatron.checkpoint.conversion.export import Exporter
    from megatron.checkpoint.steps.upload import Uploader
    from megatron.engine.checkpointer import Checkpointer

FAILURES = "checkpoint_failures"
"""Column and metric: how many saves of this run have failed so far; there is none until one has."""


@dataclass(frozen=True, kw_only=True)
class SavePlan:
    """Iterations after which to save, besides the last.

    factor:    every `factor` iterations; with `logarithmic`, at the whole part of every power of it; None = never
    extra:     further iterations; 0 = before the first step
    """

    factor: float | None = None
    logarithmic: bool = False
    extra: frozenset[int] = frozenset()


def is_save_iteration(iteration: int, plan: SavePlan) -> bool:
    """Whether the plan wants a checkpoint after this iteration.

    >>> linear, powers = SavePlan(factor=10), SavePlan(factor=2, logarithmic=True)
    >>> [i for i in range(40) if is_save_iteration(i, linear)], [i for i in range(40) if is_save_iteration(i, powers)]
    ([10, 20, 30], [1, 2, 4, 8, 16, 32])
    """
    if iteration in plan.extra:
        return True
    if iteration <= 0 or not plan.factor:
        return False
    if not plan.logarithmic:
        return iteration % plan.factor == 0
    # Floating point gives the exponent to within one.
    near = round(math.log(iteration) / math.log(plan.factor))
    return any(math.floor(plan.factor**k) == iteration for k in range(max(0, near - 1), near + 2))


@dataclass(kw_only=True, eq=False)
class CheckpointHook(Hook):
    """Saves by plan, and at the end what was not saved yet.

    report: takes numbers for the trackers and for a step's row
    took:   receives how many seconds the last checkpoint took, at every step
    """

    plan: SavePlan
    checkpoints: Checkpointer
    report: Report | None = None
    took: Callable[[float], None] = lambda seconds: None
    _found: int = field(default=0, init=False)

    def on_start(self, state: TrainState, engine: Engine) -> None:
        """Save before the first step if asked to; where a run resumes, there is a checkpoint already."""
        self._found = state.iteration
        if state.iteration == 0 and is_save_iteration(0, self.plan):
            self._save(state)

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """Publish what is written by now; save by plan."""
        self.checkpoints.poll()
        if is_save_iteration(state.iteration, self.plan):
            self._save(state)
        self._tell_seconds()
        if self.checkpoints.failures and self.report is not None:
            count = float(self.checkpoints.failures)
            self.report({"checkpoint/failures": count}, {FAILURES: count})
        return Verdict.CONTINUE

    def before_rollback(self, state: TrainState, engine: Engine) -> None:
        """Finish what is being written: it may be what is gone back to."""
        self.checkpoints.finish()

    def after_rollback(self, state: TrainState, engine: Engine) -> None:
        """Write the checkpoint again, with what was decided since: a resume from it must not go the wrong way once more."""
        # Those written later are set aside.
        self.checkpoints.saved = self._found = state.iteration
        self._save(state)

    def on_stop(self, state: TrainState, engine: Engine) -> None:
        """Wait for what is being written, and save the last state, once."""
        self.checkpoints.finish()
        if state.iteration not in (self._found, self.checkpoints.saved):
            self._save(state, last=True)

    def on_error(self, state: TrainState, error: BaseException) -> None:
        """Finish or discard what is being written."""
        self.checkpoints.abandon(error)

    def _save(self, state: TrainState, *, last: bool = False) -> None:
        fault_injection.point("save")
        self.checkpoints.save(state.iteration, state.samples, state.tokens, last=last)
        self._tell_seconds()

    def _tell_seconds(self) -> None:
        if self.checkpoints.seconds is not None:
            self.took(self.checkpoints.seconds)


class LockHook(Hook):
    """Ends a run whose folder another run has taken over. Asks at every step boundary, before anything is saved.

    check: raises when the folder is another run's by now
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """Go on while the folder is this run's."""
        self._check()
        return Verdict.CONTINUE


PATIENCE_S = 600.0
"""A finished run waits for its uploads as long as something moves at least this often."""

EARLY_S = 10.0
"""A run that was told to stop is started again and goes on with its uploads and exports then: it leaves within its time of grace."""


class WorkerHook(Hook):
    """Starts uploads or exports of checkpoints with a run, counts their failures, and ends them. Stands behind the last save of a run.

    kind:   "upload" or "export"
    report: takes numbers for the trackers and for a step's row
    drain:  waits until everything is there, or until the next start has to do it
    """

    def __init__(self, worker: Uploader | Exporter, kind: str, *, report: Report, drain: Callable[[], object]) -> None:
        self.worker = worker
        self.kind = kind
        self.report = report
        self.drain = drain

    def on_start(self, state: TrainState, engine: Engine) -> None:
        """Take up what an earlier start left."""
        self.worker.start()

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """Report the failures so far; they are in the next step's row."""
        failures = float(self.worker.failures)
        self.report({f"checkpoint/{self.kind}_failures": failures}, {f"{self.kind}_failures": failures})
        return Verdict.CONTINUE

    def on_stop(self, state: TrainState, engine: Engine) -> None:
        """Wait until everything is there, or until the next start has to do it."""
        self.drain()

    def on_error(self, state: TrainState, error: BaseException) -> None:
        """Leave the rest to the next start."""
        self.worker.stop()
