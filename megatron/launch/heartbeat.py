# SPDX-License-Identifier: Apache-2.0
"""What a rank is doing and since when: its loop notes progress, a file that all ranks read keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from megatron.atomic_io import atomic_write

FOLDER = "heartbeat"


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """One rank's record.

    moves:   count of signs of progress; idle_s: seconds since the last of them
    limit_s: idle so long, it counts as stuck; None = it is not watched
    time:    seconds since 1970, by the clock of `host`
    stack:   of the thread that trains, once it has not moved for too long
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    moves: int
    idle_s: float
    limit_s: float | None
    time: float
    standing: int | None = None
    place: str = ""
    stack: Sequence[str] = ()


def file_of(folder: Path, rank: int) -> Path:
    """Where a rank's record is."""
    return folder / f"rank_{rank}.json"


def write(folder: Path, record: Heartbeat) -> float | None:
    """Put the record in its place; returns the file's time, by the clock of whoever keeps the folder. None: it could not be written.

    The folder that `folder` is in is the run's and made by the run, once it is sure that it begins.
    """
    path = file_of(folder, record.rank)
    try:
        folder.mkdir(exist_ok=True)
        with atomic_write(path, durable=False) as file:
            file.write(json.dumps(asdict(record)))
        return path.stat().st_mtime
    except OSError:
        # A full disk is told by whoever needs it; a run does not end for want of a heartbeat.
        return None


def read(folder: Path, rank: int) -> tuple[Heartbeat, float] | None:
    """A rank's record and its file's time; None where there is none to read."""
    path = file_of(folder, rank)
    try:
        return Heartbeat(**json.loads(path.read_text(encoding="utf-8"))), path.stat().st_mtime
    except (OSError, ValueError, TypeError):
        return None


T = TypeVar("T")

SETUP, STEP, EVALUATE, SAVE, LOAD, ENDED, FAILED = "setup", "step", "evaluate", "save", "load", "ended", "failed"
OVER = (ENDED, FAILED)


class RankProgress:
    """Step, phase and a count of moves. One thread writes, others read; each field alone is enough for them, so no lock is held.

    moves: grows with every sign of progress: a step, a micro batch, a batch of an evaluation, a phase
    warm:  the first step is done; before, kernels are compiled and index maps built
    """

    def __init__(self) -> None:
        self.step = 0
        self.phase = SETUP
        self.moves = 0
        self.warm = False

    def beat(self) -> None:
        """There is progress."""
        self.moves += 1

    def begin_step(self, number: int) -> None:
        """Optimizer step `number`, counted from 1, begins."""
        self.step, self.phase = number, STEP
        self.beat()

    def end_step(self) -> None:
        """It is done."""
        self.warm = True
        self.beat()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What is inside is `phase`."""
        before, self.phase = self.phase, phase
        self.beat()
        try:
            yield
        finally:
            self.phase = before
            self.beat()

    def counted(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; each taken is progress."""
        for item in items:
            self.beat()
            yield item
