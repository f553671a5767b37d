# SPDX-License-Identifier: Apache-2.0
"""The heartbeat file of a rank: what it is doing and since when. Written by the rank, read by all of them and by people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

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
