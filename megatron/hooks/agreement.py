# SPDX-License-Identifier: Apache-2.0
"""Whether the run is to stop, and how it then ends: agreed by all ranks from their signals and their clocks. Stops nothing itself."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from megatron.errors import ExitCode
from megatron.launch.stopping import StopRequest
from megatron.log import get_logger

log = get_logger(__name__)

T = TypeVar("T")

JOB_END = "SLURM_JOB_END_TIME"
# What ranks tell each other; the greatest wins.
GO_ON, REQUEUE, INTERRUPT = 0, 1, 2
RECENT_STEPS = 20
SAVE_FACTOR, STEP_FACTOR = 1.5, 2.0
DEFAULT_MARGIN_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Times that bound a run, in seconds.

    duration: stop at the first step that ends after so much time of training
    end_at:   the job is ended then from outside (seconds since 1970); a checkpoint must be complete before
    margin:   kept free before end_at, beside what a save and steps were measured to take
    grace:    from SIGTERM to SIGKILL at this site; None = not known
    """

    duration: float | None = None
    end_at: float | None = None
    margin: float = DEFAULT_MARGIN_S
    grace: float | None = None


def job_end(environ: Mapping[str, str]) -> float | None:
    """When Slurm ends this job, in seconds since 1970; None where it does not say."""
    told = environ.get(JOB_END, "")
    return float(told) if told.isdecimal() and int(told) > 0 else None


class Stopping:
    """The question whether to stop, asked on all ranks together.

    request:  this rank's signals
    greatest: a number -> the greatest of all ranks, the same everywhere; by default this process alone decides
    reason:   why the run stops; None while it goes on
    cut_short: an evaluation was broken off
    """

    def __init__(
        self,
        request: StopRequest | None = None,
        *,
        greatest: Callable[[int], int] = int,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.request = request or StopRequest()
        self.limits = limits or Limits()
        self.reason: str | None = None
        self.cut_short = False
        self._greatest = greatest
        self._clock = clock
        self._verdict = GO_ON
        self._saves = 0.0
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._began: float | None = None
        end_at = self.limits.end_at
        # Counted from now on, so that a clock that is set anew changes nothing.
        self._end_at = None if end_at is None else clock() + (end_at - time.time())

    def begin(self) -> None:
        """Training begins."""
        self._began = self._clock()

    def agreed(self) -> bool:
        """Whether to stop. All ranks call it at the same point; once yes, it stays yes."""
        if self._verdict == GO_ON:
            own, number = self._own()
            self._verdict = self._greatest(number)
            if self._verdict != GO_ON:
                self.reason = own or "another rank was told to stop"
        return self._verdict != GO_ON

    def until(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, as long as the run goes on. All ranks draw from it alike; `cut_short` tells whether it ended early."""
        for item in items:
            if self.agreed():
                self.cut_short = True
                return
            yield item

    def outcome(self, *, progress: bool, complete: bool) -> ExitCode:
        """How this process ends.

        progress: a step was made since it started
        complete: all steps of the run are made
        """
        if self._verdict == GO_ON or (complete and not self.cut_short):
            return ExitCode.DONE
        if self._verdict == INTERRUPT:
            return ExitCode.INTERRUPTED
        return ExitCode.REQUEUE if progress else ExitCode.NO_PROGRESS

    def note_step(self, seconds: float) -> None:
        """A step took so long."""
        self._steps.append(seconds)

    def note_save(self, seconds: float) -> None:
        """A save took so long, which moves the time to stop and may be longer than this site gives."""
        longest, self._saves = self._saves, max(seconds, self._saves)
        grace = self.limits.grace
        if grace is None or seconds <= max(grace, longest):
            return
        need = self.lead()
        if self._end_at is not None:
            mend = f"the run stops {need:.0f} s before the job's end instead"
        else:
            mend = f"have it signalled {need:.0f} s before the end (sbatch --signal=USR1@{need:.0f}), or set exit_duration_in_mins"
        log.warning(
            "a save took %.1f s, but a job gets only %.1f s from SIGTERM to SIGKILL here (grace_in_secs), so a save that begins with "
            "SIGTERM would be lost: %s; or save faster (checkpoint_async)",
            *(seconds, grace, mend),
        )

    def lead(self) -> float:
        """Seconds before the job's end at which to stop: room for a save, for the step under way, and the margin."""
        return SAVE_FACTOR * self._saves + STEP_FACTOR * max(self._steps, default=0.0) + self.limits.margin

    def _own(self) -> tuple[str | None, int]:
        """This rank's reason, and what it tells the others."""
        received, now = self.request.received, self._clock()
        if received is not None:
            return received.name, INTERRUPT if received == signal.SIGINT else REQUEUE
        duration = self.limits.duration
        if duration is not None and self._began is not None and self._steps and now >= self._began + duration:
            return "time limit", REQUEUE
        if self._end_at is not None and now >= self._end_at - self.lead():
            return f"the job ends in {max(0.0, self._end_at - now):.0f} s", REQUEUE
        return None, GO_ON


def timed(save: Callable[[T], None], stopping: Stopping) -> Callable[[T], None]:
    """`save`, whose seconds are noted."""

    def measured(state: T) -> None:
        started = time.monotonic()
        save(state)
        stopping.note_save(time.monotonic() - started)

    return measured
