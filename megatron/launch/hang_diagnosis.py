# SPDX-License-Identifier: Apache-2.0
"""Of ranks that no longer move: which one is the cause, and which ones wait for it. Pure functions over what is known of each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from traceback import FrameSummary

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
