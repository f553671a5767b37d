# SPDX-License-Identifier: Apache-2.0
"""Tells a rank's watch which hook it is in and which step comes next."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.engine.base import Engine, StepResult
from megatron.hooks.base import BaseHook, Hook, TrainState, Verdict
from megatron.hooks.checkpointing import CheckpointHook, WorkerHook
from megatron.hooks.validation import ValidationHook
from megatron.launch.heartbeat import EVALUATE, SAVE, STEP, Pulse


class Phased:
    """A hook during which the rank is in a phase."""

    def __init__(self, hook: Hook, pulse: Pulse, phase: str) -> None:
        self.hook = hook
        self.pulse = pulse
        self.phase = phase

    def on_start(self, state: TrainState, engine: Engine) -> None:
        """The hook's own."""
        with self.pulse.during(self.phase):
            self.hook.on_start(state, engine)

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """The hook's own."""
        with self.pulse.during(self.phase):
            return self.hook.after_step(state, result, engine)

    def on_stop(self, state: TrainState, engine: Engine) -> None:
        """The hook's own."""
        with self.pulse.during(self.phase):
            self.hook.on_stop(state, engine)

    def before_rollback(self, state: TrainState, engine: Engine) -> None:
        """The hook's own."""
        with self.pulse.during(self.phase):
            self.hook.before_rollback(state, engine)

    def after_rollback(self, state: TrainState, engine: Engine) -> None:
        """The hook's own."""
        with self.pulse.during(self.phase):
            self.hook.after_rollback(state, engine)

    def on_error(self, state: TrainState, error: BaseException) -> None:
        """The hook's own."""
        self.hook.on_error(state, error)


class FirstHook(BaseHook):
    """Stands before all others: a step has ended."""

    def __init__(self, pulse: Pulse) -> None:
        self.pulse = pulse

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """The step is progress."""
        self.pulse.end_step()
        return Verdict.CONTINUE


class LastHook(BaseHook):
    """Stands after all others: the next step begins."""

    def __init__(self, pulse: Pulse) -> None:
        self.pulse = pulse

    def on_start(self, state: TrainState, engine: Engine) -> None:
        """The first step, and from now on each micro batch is progress, too."""
        module = engine.module()
        module.register_forward_pre_hook(lambda module, inputs: self.pulse.beat())
        self.pulse.begin_step(state.iteration + 1)

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """The next one."""
        self.pulse.begin_step(state.iteration + 1)
        return Verdict.CONTINUE


def phase_of(hook: Hook) -> str:
    """What a rank is doing while it is in the hook."""
    if isinstance(hook, (CheckpointHook, WorkerHook)):
        return SAVE
    return EVALUATE if isinstance(hook, ValidationHook) else STEP


def watched(hooks: Sequence[Hook], pulse: Pulse) -> list[Hook]:
    """The same hooks; the watchdog is told what they do."""
    return [FirstHook(pulse), *(Phased(hook, pulse, phase_of(hook)) for hook in hooks), LastHook(pulse)]
