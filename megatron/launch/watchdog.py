# SPDX-License-Identifier: Apache-2.0
"""Watches a rank from a thread of its own: keeps its heartbeat file, and ends a job that is stuck, naming the rank that it waits for.

Which rank that is, their stacks say, or their silence, or who is furthest behind.
"""

from __future__ import annotations

import faulthandler
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path

from megatron.launch import heartbeat
from megatron.launch.heartbeat import ENDED, FAILED, LOAD, OVER, SAVE, SETUP, Heartbeat, RankProgress
from megatron.launch.rank_events import write_failure
from megatron.secrets import redact

# Before the first step kernels are compiled and index maps built; saving and loading one large file shows no progress in between.
PATIENT = 3.0
# While files are written or read, so much per look is progress, too; a heartbeat file is a thousandth of it.
MOVED_BYTES = 1 << 20
# A rank is silent when its file is older than so many intervals, and not only late on a busy disk.
LATE = 3.0
LATE_AT_LEAST_S = 2.0
# Between the last words and the end. A rank that ends breaks the collectives of the others, which should have had their say by then.
AFTER_S = 1.0
# While ranks compare notes they look this often.
SHORT_S = 0.25
# Writes and looks within the limit.
WRITES_PER_LIMIT = 8
STATUS = 1


@dataclass(frozen=True, kw_only=True)
class WatchPlan:
    """How a rank is watched.

    world:      number of ranks
    folder:     for heartbeat files, seen by all ranks; None = none are kept, and each rank judges for itself
    interval_s: between two writes
    limit_s:    without progress for so long, the job ends; None = never
    note:       where the rank's starter looks for its last words; None = they go to stderr
    """

    rank: int
    world: int
    folder: Path | None
    interval_s: float = 10.0
    limit_s: float | None = None
    note: str | None = None
    host: str = field(default_factory=socket.gethostname)


class Watch:
    """The thread. `start` it in the thread that trains, and `stop` it at the end."""

    def __init__(self, plan: WatchPlan, progress: RankProgress, *, end: Callable[[int], object] = os._exit) -> None:
        self.plan = plan
        self.progress = progress
        self._end = end
        self._over = threading.Event()
        self._watched = threading.get_ident()
        self._thread = threading.Thread(target=self._run, name="neox-watch", daemon=True)
        self._moves, self._bytes, self._idle_s = -1, _bytes_moved(), 0.0
        self._file_time: float | None = None
        # A file that is written less often than that says too little about who moves.
        self._tick_s = max(0.05, plan.interval_s if plan.limit_s is None else min(plan.interval_s, plan.limit_s / WRITES_PER_LIMIT))

    def start(self) -> None:
        """Begin, unless there is nothing to do."""
        if self.plan.folder is not None or self.plan.limit_s is not None:
            self._thread.start()

    def stop(self, phase: str = ENDED) -> None:
        """The run is over; `phase` (ended or failed) stays in the file."""
        if not self._thread.is_alive():
            return
        self._over.set()
        self._thread.join(timeout=LATE_AT_LEAST_S)
        if self.plan.note is not None:
            faulthandler.cancel_dump_traceback_later()
        self.progress.phase = phase
        self._write()

    # The thread

    def _run(self) -> None:
        looked = time.monotonic()
        self._write()
        while not self._over.wait(self._tick_s):
            now = time.monotonic()
            # A process that was suspended has not been idle meanwhile.
            self._look(min(now - looked, 2 * self._tick_s))
            looked = now
            self._write()
            limit = self._limit_s()
            if limit is None:
                continue
            if self.plan.note is not None:
                # Where not even this thread runs, as another one keeps Python's lock, a thread in C shows all stacks.
                faulthandler.dump_traceback_later(2 * PATIENT * limit, file=sys.__stderr__ or sys.stderr)
            if self._idle_s >= limit and self._job_is_stuck(limit):
                self._tell_and_end()

    def _look(self, passed_s: float) -> None:
        moves, moved = self.progress.moves, _bytes_moved()
        with_files = self.progress.phase in (SETUP, SAVE, LOAD) and moved - self._bytes >= MOVED_BYTES
        self._idle_s = 0.0 if moves != self._moves or with_files else self._idle_s + passed_s
        self._moves, self._bytes = moves, moved

    def _limit_s(self) -> float | None:
        limit = self.plan.limit_s
        patient = not self.progress.warm or self.progress.phase in (SAVE, LOAD)
        return limit if limit is None or not patient else PATIENT * limit

    def _write(self, stack: traceback.StackSummary | None = None) -> Heartbeat:
        standing, place = (None, "") if stack is None else standing_of(stack)
        record = Heartbeat(
            rank=self.plan.rank,
            host=self.plan.host,
            pid=os.getpid(),
            step=self.progress.step,
            phase=self.progress.phase,
            moves=self.progress.moves,
            idle_s=round(self._idle_s, 3),
            limit_s=self._limit_s(),
            time=time.time(),
            standing=standing,
            place=place,
            stack=[] if stack is None else redact("".join(stack.format())).splitlines(),
        )
        if self.plan.folder is not None:
            self._file_time = heartbeat.write(self.plan.folder, record)
        return record

    def _stack(self) -> traceback.StackSummary:
        frames = sys._current_frames()
        stacks = [traceback.extract_stack(frames[self._watched])] if self._watched in frames else []
        # A backward pass on a device runs its hooks in threads of its own.
        stacks += [traceback.extract_stack(frame) for number, frame in frames.items() if number not in (self._watched, self._thread.ident)]
        if stacks and standing_of(stacks[0])[0] is Standing.UNCLEAR:
            return next((stack for stack in stacks if standing_of(stack)[0] is Standing.WAITING), stacks[0])
        return stacks[0] if stacks else traceback.StackSummary()

    # The other ranks

    def _others(self) -> list[tuple[Heartbeat, float]]:
        """Every other rank's record, and how long ago it was written."""
        if self.plan.folder is None or self._file_time is None:
            return []
        found = (heartbeat.read(self.plan.folder, rank) for rank in range(self.plan.world) if rank != self.plan.rank)
        return [(record, max(0.0, self._file_time - written)) for record, written in filter(None, found)]

    def _late_s(self) -> float:
        return max(LATE * self._tick_s, LATE_AT_LEAST_S)

    def _job_is_stuck(self, limit: float) -> bool:
        """Whether no other rank moves either: a rank that saves for all of them keeps them waiting, and that is well."""
        self._write()
        for record, age in self._others():
            # Two looks of two threads may be that far apart.
            if record.phase not in OVER and record.idle_s + age < (record.limit_s or limit) - 2 * self._tick_s:
                return False
        return True

    def _tell_and_end(self) -> None:
        """Compare with what the others write within a moment, leave the last words, end the process."""
        stack = self._stack()
        deadline = time.monotonic() + self._late_s() + self._tick_s
        while True:
            own = self._write(stack)
            others = [(record, age) for record, age in self._others() if record.phase not in OVER]
            if all(record.standing is not None for record, _ in others) or time.monotonic() >= deadline:
                break
            self._over.wait(min(self._tick_s, SHORT_S))
            if self.progress.moves != self._moves or self._over.is_set():
                return  # it goes on after all
        ranks = [own, *(self._as_seen(record, age) for record, age in others)]
        self._leave(sorted(ranks, key=lambda rank: rank.rank), "".join(stack.format()).rstrip())
        sys.stdout.flush()
        time.sleep(AFTER_S)
        self._end(STATUS)

    def _as_seen(self, record: Heartbeat, age: float) -> Heartbeat:
        """Another rank's record, written `age` seconds ago, as it is now: silent where it should have said more by then."""
        silent = record.standing is None and age > self._late_s()
        return replace(record, idle_s=record.idle_s + age, standing=Standing.SILENT if silent else record.standing)

    def _leave(self, ranks: list[Heartbeat], stack: str) -> None:
        """Say who is stuck; every rank speaks for itself, and of one that cannot, the first of the others tells."""
        own = next(rank for rank in ranks if rank.rank == self.plan.rank)
        guilty = causes(ranks)
        silent = next((rank for rank in guilty if _standing(rank) is Standing.SILENT), None)
        speaker = min(rank.rank for rank in ranks if _standing(rank) is not Standing.SILENT)
        if own in guilty:
            # Alone in view, and waiting: whoever it waits for is not in view.
            alone = len(ranks) == 1 and self.plan.world > 1 and _standing(own) is Standing.WAITING
            self._say(f"stuck: {_name(own)} {_state(own)}\n{stack}", consequence=alone)
        elif silent is not None and own.rank == speaker:
            text = f"stuck: {_name(silent)} {_state(silent)}\n{_name(own)} {_state(own)}"
            self._say(text, consequence=False, about=silent.rank)
        else:
            self._say(_state(own), consequence=True)

    def _say(self, text: str, *, consequence: bool, about: int | None = None) -> None:
        if self.plan.note is not None:
            write_failure(self.plan.note, text, consequence=consequence, about=about)
        else:
            sys.stderr.write(f"[rank {self.plan.rank}] {redact(text)}\n")
            sys.stderr.flush()


def _bytes_moved() -> int:
    """Bytes this process has read and written, on Linux; elsewhere 0, and only moves count."""
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            return sum(int(line.split(":")[1]) for line in file if line.startswith(("rchar", "wchar")))
    except (OSError, ValueError):
        return 0


@contextmanager
def watching(plan: WatchPlan) -> Iterator[RankProgress]:
    """Watch what is inside, which notes its progress in what it is given."""
    progress = RankProgress()
    watch = Watch(plan, progress)
    watch.start()
    phase = FAILED
    try:
        yield progress
        phase = ENDED
    finally:
        watch.stop(phase)


# Which rank is the cause

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


def standing_of(stack: Sequence[traceback.FrameSummary]) -> tuple[Standing, str]:
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


def causes(ranks: Sequence[Heartbeat]) -> list[Heartbeat]:
    """The ranks without which the others would go on: those most likely so, and among ranks that all wait, those furthest behind."""
    if not ranks:
        return []
    first = min(_standing(rank) for rank in ranks)
    likely = [rank for rank in ranks if _standing(rank) is first]
    if first in (Standing.SILENT, Standing.BUSY):
        return likely
    behind = min((rank.step, rank.moves) for rank in likely)
    return [rank for rank in likely if (rank.step, rank.moves) == behind]


def _standing(rank: Heartbeat) -> Standing:
    """What a rank's record says; one that has not looked at its own stack yet is unclear."""
    return Standing.UNCLEAR if rank.standing is None else Standing(rank.standing)


def _name(rank: Heartbeat) -> str:
    return f"rank {rank.rank} on {rank.host}"


def _state(rank: Heartbeat) -> str:
    """What is known of a rank, in one line."""
    at = f"for {rank.idle_s:.0f} s (step {rank.step}, phase {rank.phase})"
    standing = _standing(rank)
    if standing is Standing.SILENT:
        return f"has not been heard of {at}: its process is stopped, or its host hangs"
    return f"{'waits' if standing is Standing.WAITING else 'has not moved'} {at}" + (f" in {rank.place}" if rank.place else "")
