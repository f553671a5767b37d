# SPDX-License-Identifier: Apache-2.0
"""The errors a user can meet. Every one says what is wrong, where, and how to mend it."""

from __future__ import annotations

from enum import IntEnum
from typing import TypeVar

T = TypeVar("T")


class ExitCode(IntEnum):
    """How a process ends, for whoever starts the next one."""

    DONE = 0
    FAILED = 1
    # Told to stop, and saved: start again.
    REQUEUE = 75
    # Told to stop before a single step was made: a restart would only go round in circles.
    NO_PROGRESS = 76
    # Configuration, data or checkpoint cannot be used: a restart meets the same.
    UNUSABLE = 77
    # The numbers went wrong.
    DIVERGED = 78
    # Ctrl-C, as a shell shows it; saved, too.
    INTERRUPTED = 130


STOPPED = frozenset({ExitCode.REQUEUE, ExitCode.NO_PROGRESS, ExitCode.INTERRUPTED})
"""A process that was told to stop, and did so in order."""


class NeoXError(Exception):
    """Base of all errors raised on purpose.

    what:  one sentence, what is wrong
    where: file:line, key, tensor or path it is about
    mend:  what the user does about it
    """

    exit_code = ExitCode.FAILED

    def __init__(self, what: str, *, where: str | None = None, mend: str | None = None) -> None:
        self.what = what
        self.where = where
        self.mend = mend
        super().__init__(self.report())

    def report(self) -> str:
        """The message as shown to the user, one line per part."""
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.mend:
            lines.append(f"  mend:  {self.mend}")
        return "\n".join(lines)


class ConfigError(NeoXError):
    """A YAML key, command-line flag or combination of keys cannot be used."""

    exit_code = ExitCode.UNUSABLE


class DataError(NeoXError):
    """A dataset, index map or tokenizer file is missing, damaged or does not fit."""

    exit_code = ExitCode.UNUSABLE


class CheckpointError(NeoXError):
    """A checkpoint is missing, damaged or does not fit the model."""

    exit_code = ExitCode.UNUSABLE


class BackendError(NeoXError):
    """A requested kernel, package or device is not available here."""


class TrainingError(NeoXError):
    """Training cannot go on (non-finite loss, lost rank, ...)."""


class LostRankError(TrainingError):
    """Another rank ended or cannot be reached. What ended it is that rank's report, so this one is told last."""


def required(value: T | None, key: str) -> T:
    """`value`, which must be known by now. Raises ConfigError naming the key."""
    if value is None:
        raise ConfigError(f"{key} is not known", where=key, mend=f"set {key}")
    return value
