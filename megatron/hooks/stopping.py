# SPDX-License-Identifier: Apache-2.0
"""What ends a run before its last iteration: an interval, a time limit or a signal."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from megatron import fault_injection
from megatron.engine.base import Engine, StepResult
from megatron.errors import ConfigError, ExitStatus, NoTimeError
from megatron.hooks.base import Hook, TrainState, Verdict
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

    def told_to_stop(self) -> bool:
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


class StopHook(Hook):
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


SLURM_END = "SLURM_JOB_END_TIME"
RECENT = 50
# A save may take longer than any before it, and a step is under way when time is up.
SAVE_RESERVE, STEP_RESERVE = 1.5, 2.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is known of the time a run has.

    duration_s: it stops when this much has passed (`exit_duration_in_mins`)
    killed_at:  seconds since 1970 at which the job is ended from outside, saved or not
    margin_s:   kept free before `killed_at`, besides what saves and steps are seen to take
    grace_s:    from the request to stop to the SIGKILL, where it is known
    """

    duration_s: float | None = None
    killed_at: float | None = None
    margin_s: float = 60.0
    grace_s: float | None = None


def job_end(environ: Mapping[str, str]) -> float | None:
    """When Slurm ends this job, in seconds since 1970. None where nothing says so.

    Raises ConfigError when the variable holds no number.
    """
    text = environ.get(SLURM_END, "").strip()
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{SLURM_END} is {text!r}, not seconds since 1970", where="environment", fix=f"unset {SLURM_END}") from None


class WallClock:
    """Watches how long steps and saves take, and says when to stop."""

    def __init__(
        self, limits: Limits | None = None, *, clock: Callable[[], float] = time.monotonic, now: Callable[[], float] = time.time
    ) -> None:
        self.limits = limits or Limits()
        self._clock = clock
        began = clock()
        self._stop = None if self.limits.duration_s is None else began + self.limits.duration_s
        # Counted by a clock that nobody sets.
        self._killed = None if self.limits.killed_at is None else began + self.limits.killed_at - now()
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._save_s = 0.0

    def step_took(self, seconds: float) -> None:
        """One optimizer step, validation and other hooks not counted."""
        self._steps.append(seconds)

    def save_took(self, seconds: float) -> None:
        """One checkpoint, until it was complete. Warns when the grace is shorter."""
        longest, self._save_s = self._save_s, max(self._save_s, seconds)
        grace = self.limits.grace_s
        if grace is None or seconds <= longest:
            return
        needed = self.needed_s()
        if needed > grace:
            log.warning(
                "a stop needs up to %.1f s (a checkpoint took %.1f s, a step %.1f s), but only %.1f s are left after the request "
                "(grace_in_secs): ask earlier (sbatch --signal=B:USR1@%d), save to a faster disk, or use checkpoint_async",
                *(needed, seconds, max(self._steps, default=0.0), grace, round(2 * needed) + 1),
            )

    def needed_s(self) -> float:
        """Time that stopping takes at most, going by what was seen."""
        return SAVE_RESERVE * self._save_s + STEP_RESERVE * max(self._steps, default=0.0)

    def reason(self) -> str | None:
        """Why time is up; None while it is not."""
        now = self._clock()
        if self._stop is not None and now >= self._stop:
            return "time limit"
        left = self.left_s()
        if left is not None and left <= self.limits.margin_s + self.needed_s():
            return f"the job ends in {max(0.0, left):.0f} s"
        return None

    def left_s(self) -> float | None:
        """Until the job is ended from outside; None where nothing says when."""
        return None if self._killed is None else self._killed - self._clock()
