# SPDX-License-Identifier: Apache-2.0
"""When a checkpoint is written. How, is the business of the callable handed over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron import faults
from megatron.engine.base import Engine, StepResult
from megatron.hooks.base import BaseHook, TrainState, Verdict

Save = Callable[[TrainState], None]


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


class CheckpointHook(BaseHook):
    """Saves by plan, and at the end what was not saved yet.

    took: is told how many seconds each took
    """

    def __init__(self, *, plan: SavePlan, save: Save, took: Callable[[float], None] = lambda seconds: None) -> None:
        self.plan = plan
        self.save = save
        self.took = took
        self._saved = 0

    def on_start(self, state: TrainState, engine: Engine) -> None:
        """Save before the first step if asked to; where a run resumes, there is a checkpoint already."""
        self._saved = state.iteration
        if state.iteration == 0 and is_save_iteration(0, self.plan):
            self._save(state)

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """Save by plan."""
        if is_save_iteration(state.iteration, self.plan):
            self._save(state)
        return Verdict.CONTINUE

    def on_stop(self, state: TrainState, engine: Engine) -> None:
        """Save the last state, once."""
        if state.iteration != self._saved:
            self._save(state)

    def _save(self, state: TrainState) -> None:
        faults.point("save")
        began = time.monotonic()
        self.save(state)
        self.took(time.monotonic() - began)
        self._saved = state.iteration
