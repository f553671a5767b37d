# SPDX-License-Identifier: Apache-2.0
"""What the loop tells its hooks. A hook watches or acts at step boundaries; it never computes a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from megatron.errors import ExitStatus

if TYPE_CHECKING:
    from megatron.engine.base import Engine, StepResult


class Verdict(Enum):
    """What a hook answers after a step."""

    CONTINUE = "continue"
    STOP = "stop"
    ROLLBACK = "rollback"  # to a checkpoint; hooks that stand behind are not told of the step


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What changes during a run; replaced, never written to.

    iteration: optimizer steps done
    target:    iteration at which training ends
    samples, tokens: consumed so far, over all data ranks
    status:    once the run is over, what the process's end means
    """

    iteration: int = 0
    target: int = 0
    samples: int = 0
    tokens: int = 0
    status: ExitStatus = ExitStatus.DONE

    def after(self, *, samples: int, tokens: int) -> TrainState:
        """The state one step later."""
        return replace(self, iteration=self.iteration + 1, samples=self.samples + samples, tokens=self.tokens + tokens)


class Hook:
    """Called by the loop, in the order of the hook list. Does nothing; hooks override what they need."""

    def on_start(self, state: TrainState, engine: Engine) -> None:
        """Before the first step (state.iteration > 0 after a resume)."""

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """After every optimizer step; state already counts it."""
        return Verdict.CONTINUE

    def before_rollback(self, state: TrainState, engine: Engine) -> None:
        """Training is about to go back from `state` to a checkpoint."""

    def after_rollback(self, state: TrainState, engine: Engine) -> None:
        """Weights, optimizer and random states are those of `state` again."""

    def on_stop(self, state: TrainState, engine: Engine) -> None:
        """After the last step, also when another hook stopped the run."""

    def on_error(self, state: TrainState, error: BaseException) -> None:
        """When the loop ends by an exception; must not raise."""
