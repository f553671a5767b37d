# SPDX-License-Identifier: Apache-2.0
"""When a run must stop so that its last checkpoint is written in time. Knows no signal and no rank."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron.errors import ConfigError
from megatron.log import get_logger

log = get_logger(__name__)

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
