# SPDX-License-Identifier: Apache-2.0
"""What ends a run before its last iteration: an interval, a time limit or a signal."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from datetime import datetime
from types import FrameType
from typing import Any

from megatron.engine.base import Engine, StepResult
from megatron.hooks.base import BaseHook, TrainState, Verdict
from megatron.log import get_logger
from megatron.progress import format_exit

log = get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopHook(BaseHook):
    """Answers STOP at a step boundary on which all ranks agree. Must be the last hook that acts on steps.

    exit_interval: stop after iterations that are a multiple of it
    time_limit_s:  stop when this much time has passed since the hook was made
    any_rank:      "true on any rank?", the same answer everywhere; by default this process alone decides
    reason:        why the run stops; None while it goes on
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        exit_interval: int | None = None,
        time_limit_s: float | None = None,
        any_rank: Callable[[bool], bool] = bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rank = rank
        self.exit_interval = exit_interval
        self.any_rank = any_rank
        self.clock = clock
        self.deadline = None if time_limit_s is None else clock() + time_limit_s
        self.reason: str | None = None
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    def on_start(self, state: TrainState, engine: Engine) -> None:
        """From here on, signals wait for the end of a step."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """STOP when any rank has a reason to."""
        own = self._own_reason()
        if self.any_rank(own is not None):
            self.reason = own or "another rank was told to stop"
        elif self.exit_interval and state.iteration % self.exit_interval == 0:
            self.reason = f"exit_interval {self.exit_interval}"
        if self.reason is None or state.iteration >= state.target:
            return Verdict.CONTINUE
        log.info(f"stopping after this step: {self.reason}")
        log.info(format_exit(self.rank, state.iteration, datetime.now()))
        return Verdict.STOP

    def on_stop(self, state: TrainState, engine: Engine) -> None:
        """Signals mean again what they meant before."""
        self._restore()

    def on_error(self, state: TrainState, error: BaseException) -> None:
        """As at a normal end."""
        self._restore()

    def _own_reason(self) -> str | None:
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self.deadline is not None and self.clock() >= self.deadline:
            return "time limit"
        return None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: the user does not want to wait for the step
        self._signal = number

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
