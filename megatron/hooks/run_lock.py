# SPDX-License-Identifier: Apache-2.0
"""Ends a run whose folder another run has taken over. Knows no file."""

from __future__ import annotations

from collections.abc import Callable

from megatron.engine.base import Engine, StepResult
from megatron.hooks.base import BaseHook, TrainState, Verdict


class LockHook(BaseHook):
    """Asks at every step boundary, before anything is saved.

    check: raises when the folder is another run's by now
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """Go on while the folder is this run's."""
        self._check()
        return Verdict.CONTINUE
