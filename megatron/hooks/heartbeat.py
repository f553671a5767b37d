# SPDX-License-Identifier: Apache-2.0
"""Tells a rank's watch which hook it is in and which step comes next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.engine.base import Engine, StepResult
from megatron.hooks.base import Hook, TrainState, Verdict
from megatron.hooks.checkpointing import CheckpointHook, WorkerHook
from megatron.hooks.validation import ValidationHook
from megatron.launch.heartbeat import EVALUATE, SAVE, STEP, RankProgress


def _in_phase(name: str) -> Any:
    def call(self: Phased, *given: Any) -> Any:
        with self.progress.during(self.phase):
            return getattr(self.hook, name)(*given)

    return call


class Phased(Hook):
    """A hook during which the rank is in a phase."""

    def __init__(self, hook: Hook, progress: RankProgress, phase: str) -> None:
        self.hook = hook
        self.progress = progress
        self.phase = phase

    on_start = _in_phase("on_start")
    after_step = _in_phase("after_step")
    on_stop = _in_phase("on_stop")
    before_rollback = _in_phase("before_rollback")
    after_rollback = _in_phase("after_rollback")

    def on_error(self, state: TrainState, error: BaseException) -> None:
        """The hook's own."""
        self.hook.on_error(state, error)


class FirstHook(Hook):
    """Stands before all others: a step has ended."""

    def __init__(self, progress: RankProgress) -> None:
        self.progress = progress

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """The step is progress."""
        self.progress.end_step()
        return Verdict.CONTINUE


class LastHook(Hook):
    """Stands after all others: the next step begins."""

    def __init__(self, progress: RankProgress) -> None:
        self.progress = progress

    def on_start(self, state: TrainState, engine: Engine) -> None:
        """The first step, and from now on each micro batch is progress, too."""
        module = engine.module()
        module.register_forward_pre_hook(lambda module, inputs: self.progress.beat())
        self.progress.begin_step(state.iteration + 1)

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """The next one."""
        self.progress.begin_step(state.iteration + 1)
        return Verdict.CONTINUE


def phase_of(hook: Hook) -> str:
    """What a rank is doing while it is in the hook."""
    if isinstance(hook, (CheckpointHook, WorkerHook)):
        return SAVE
    return EVALUATE if isinstance(hook, ValidationHook) else STEP


def watched(hooks: Sequence[Hook], progress: RankProgress) -> list[Hook]:
    """The same hooks; the watchdog is told what they do."""
    return [FirstHook(progress), *(Phased(hook, progress, phase_of(hook)) for hook in hooks), LastHook(progress)]
