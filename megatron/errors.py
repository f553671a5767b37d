# SPDX-License-Identifier: Apache-2.0
"""The errors a user can meet. Every one says what is wrong, where, and how to fix it."""

from __future__ import annotations

import signal
from enum import IntEnum
from typing import TypeVar

T = TypeVar("T")


class ExitStatus(IntEnum):
    """What a process's end means to whoever started it, a person or a chain of jobs."""

    DONE = 0
    CRASH = 1
    REQUEUE = 75
    """Stopped early on request, everything is saved: start it again."""
    NO_PROGRESS = 76
    """Stopped early with nothing gained since its start: starting it again would go on forever."""
    BAD_INPUT = 77
    """The configuration, the data or the checkpoint must be fixed first."""
    DIVERGED = 78
    """The numbers went wrong beyond what the policy allows: somebody must decide."""
    INTERRUPTED = 130
    """Ctrl-C."""


class NeoXError(Exception):
    """Base of all errors raised on purpose.

    what:  one sentence, what is wrong
    where: file:line, key, tensor or path it is about
    fix:  what the user does about it
    """

    exit_code: int = ExitStatus.CRASH

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what = what
        self.where = where
        self.fix = fix
        super().__init__(self.report())

    def report(self) -> str:
        """The message as shown to the user, one line per part."""
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)


class ConfigError(NeoXError):
    """A YAML key, command-line flag or combination of keys cannot be used."""

    exit_code = ExitStatus.BAD_INPUT


class DataError(NeoXError):
    """A dataset, index map or tokenizer file is missing, damaged or does not fit."""

    exit_code = ExitStatus.BAD_INPUT


class CheckpointError(NeoXError):
    """A checkpoint is missing, damaged or does not fit the model."""

    exit_code = ExitStatus.BAD_INPUT


class SaveError(CheckpointError):
    """A checkpoint could not be written."""

    exit_code = ExitStatus.CRASH


class BackendError(NeoXError):
    """A requested kernel, package or device is not available here."""


class TrainingError(NeoXError):
    """Training cannot go on (non-finite loss, lost rank, ...)."""


class DivergenceError(TrainingError):
    """The numbers went wrong for good: going on, or starting again as before, would not help."""

    exit_code = 78


class LostRankError(TrainingError):
    """Another rank ended or cannot be reached. What ended it is that rank's report, so this one is told last."""


class NoTimeError(TrainingError):
    """There is no time left for a single step; starting again in the same way would go on forever."""

    exit_code = ExitStatus.NO_PROGRESS


class StoppedError(NeoXError):
    """The process was asked to end before it was done, and has kept what it had.

    received: the signal that asked
    """

    exit_code = ExitStatus.REQUEUE

    def __init__(self, received: int, done: str = "", *, where: str | None = None) -> None:
        super().__init__(f"stopped by {signal.Signals(received).name}{done}", where=where, fix="start it again")
        if received == signal.SIGINT:
            self.exit_code = ExitStatus.INTERRUPTED


def required(value: T | None, key: str) -> T:
    """`value`, which must be known by now. Raises ConfigError naming the key."""
    if value is None:
        raise ConfigError(f"{key} is not known", where=key, fix=f"set {key}")
    return value
