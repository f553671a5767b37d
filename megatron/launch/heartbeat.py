# SPDX-License-Identifier: Apache-2.0
"""What a rank is doing and since when: told by its loop, kept in a file that all ranks read, and who of them is the cause of a hang."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from traceback import FrameSummary
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


class Pulse:
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


# A rank inside these files waits for the others: its own doing is over.
_TOGETHER = re.compile(
    r"/(torch/distributed/(?!elastic/)|deepspeed/comm/|deepspeed/runtime/pipe/p2p\.py|megatron/mpu/(comm|collectives)\.py)"
)
# A line that waits for a device or for a collective that was started before.
_WAITING = re.compile(r"\.(wait|synchronize|item|tolist|cpu)\(|run_backward")
_OURS = re.compile(r"/megatron/")


class Standing(IntEnum):
    """How likely a rank is the cause, the likeliest first."""

    SILENT = 0  # nothing is heard of it at all
    BUSY = 1  # in code of its own
    UNCLEAR = 2  # waits for a device, or is within a backward pass, where both can be
    WAITING = 3  # in a collective


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One rank as its heartbeat file shows it.

    idle_s:  since its last sign of progress
    standing, place: see `standing_of`
    """

    rank: int
    host: str
    step: int
    phase: str
    moves: int
    idle_s: float
    standing: Standing
    place: str = ""


def standing_of(stack: Sequence[FrameSummary]) -> tuple[Standing, str]:
    """What the stack of a rank's main thread (outermost first) says, and the place of ours that it is in."""
    if not stack:
        return Standing.UNCLEAR, ""
    ours = next((frame for frame in reversed(stack) if _OURS.search(frame.filename) and not _TOGETHER.search(frame.filename)), stack[-1])
    place = f"{ours.name} ({ours.filename}:{ours.lineno})"
    if any(_TOGETHER.search(frame.filename) for frame in stack):
        return Standing.WAITING, place
    if _WAITING.search(stack[-1].line or ""):
        return Standing.UNCLEAR, place
    return Standing.BUSY, place


def causes(seen: Sequence[Seen]) -> list[Seen]:
    """The ranks without which the others would go on: those most likely so, and among ranks that all wait, those furthest behind."""
    if not seen:
        return []
    first = min(rank.standing for rank in seen)
    likely = [rank for rank in seen if rank.standing is first]
    if first in (Standing.SILENT, Standing.BUSY):
        return likely
    behind = min((rank.step, rank.moves) for rank in likely)
    return [rank for rank in likely if (rank.step, rank.moves) == behind]
