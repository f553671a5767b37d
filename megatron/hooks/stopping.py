# SPDX-License-Identifier: Apache-2.0
"""What ends a run before its last iteration: an interval, a time limit or a signal."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import TypeVar

from megatron import fault_injection
from megatron.engine.base import Engine, StepResult
from megatron.errors import ExitStatus, NoTimeError
from megatron.hooks.base import BaseHook, TrainState, Verdict
from megatron.hooks.wall_clock import SLURM_END, WallClock
from megatron.log import get_logger
from megatron.progress import format_exit

log = get_logger(__name__)

T = TypeVar("T")


class StopRequest:
    """Whether the run is to stop early: one answer for all ranks, for everybody who asks at the same place.

    received: signals to this process so far, in order; whoever notes them appends
    wall:     when time is up
    any_rank: "true on any rank?", the same answer everywhere; by default this process alone decides
    reason:   why the run stops; None while it goes on
    """

    def __init__(self, received: Sequence[int] = (), *, wall: WallClock | None = None, any_rank: Callable[[bool], bool] = bool) -> None:
        self.wall = wall or WallClock()
        self.reason: str | None = None
        self._received = received
        self._any_rank = any_rank
        self._interrupted = False

    def agreed(self) -> bool:
        """Whether all ranks stop here. A collective call: every rank asks at the same place."""
        if self.reason is None:
            own = self._own_reason()
            if self._any_rank(own is not None):
                self.reason = own or "another rank was told to stop"
                self._interrupted = self._any_rank(signal.SIGINT in self._received)
        return self.reason is not None

    def told(self) -> bool:
        """Whether the run stops early, or this process was told to since; no other rank is asked."""
        return self.reason is not None or self._own_reason() is not None

    def require_time(self) -> None:
        """Before the first step. Raises NoTimeError on all ranks where the job ends too soon for one."""
        left = self.wall.left_s()
        if self._any_rank(left is not None and left <= self.wall.limits.margin_s):
            raise NoTimeError(
                f"the job ends in {max(0.0, left or 0.0):.0f} s, before a step could be made and saved",
                where=f"{SLURM_END}, exit_margin_in_secs {self.wall.limits.margin_s:g}",
                fix="ask for more time (sbatch --time), or lower exit_margin_in_secs",
            )

    def until(self, items: Iterable[T]) -> Iterator[T]:
        """The items, ending early where the run is to stop. Every rank goes through as many items."""
        for item in items:
            fault_injection.point("evaluate")
            if self.agreed():
                return
            yield item

    def status(self, *, kept: bool) -> ExitStatus:
        """What the process's end means.

        kept: steps were made since the start, and saved
        """
        if self.reason is None:
            return ExitStatus.DONE
        if self._interrupted:
            return ExitStatus.INTERRUPTED
        return ExitStatus.REQUEUE if kept else ExitStatus.NO_PROGRESS

    def _own_reason(self) -> str | None:
        if self._received:
            return signal.Signals(self._received[0]).name
        return self.wall.reason()


class StopHook(BaseHook):
    """Answers STOP at a step boundary on which all ranks agree. Must be the last hook that acts on steps.

    exit_interval: stop after iterations that are a multiple of it; such an end is no early one
    """

    def __init__(self, request: StopRequest | None = None, *, rank: int = 0, exit_interval: int | None = None) -> None:
        self.request = request or StopRequest()
        self.rank = rank
        self.exit_interval = exit_interval

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """STOP when any rank has a reason to."""
        self.request.wall.step_took(result.seconds)
        reason = self.request.reason if self.request.agreed() else None
        if reason is None and self.exit_interval and state.iteration % self.exit_interval == 0:
            reason = f"exit_interval {self.exit_interval}"
        if reason is None or state.iteration >= state.target:
            return Verdict.CONTINUE
        log.info(f"stopping after this step: {reason}")
        log.info(format_exit(self.rank, state.iteration, datetime.now()))
        return Verdict.STOP
