# SPDX-License-Identifier: Apache-2.0
"""Starts ranks on this machine, watches them, and ends all when one dies."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.launch.environment import Rendezvous, machine_environment
from megatron.launch.rank_events import FAILURE_FILE, LEAVING, Event, read_failure

POLL_S = 0.05
# After the first death: so long may the others take to fail by themselves, and then to end when told to.
GRACE_S = 3.0
LAST_S = 5.0
# After a signal from the user, ranks may be in the midst of a checkpoint.
PATIENT_LAST_S = 30.0
# After the first rank that stopped on request: others may still be writing their parts of a checkpoint.
LEAVING_S = 600.0
# So often a signal is passed on; at the next one everything is killed.
PATIENCE = 3


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One process to start: its number in the run, argument list and whole environment."""

    number: int
    argv: Sequence[str]
    environment: Mapping[str, str]


def host_ranks(told: Mapping[str, Any], environ: Mapping[str, str]) -> list[Rank]:
    """The ranks of one host.

    told: argv, environment, devices (one number per rank; None leaves them as they are), and the fields of a Rendezvous of its first rank
    """
    base = {**environ, **told["environment"]}
    devices = told["devices"]
    base |= machine_environment(base, told["local_size"])
    if devices is not None:
        base["CUDA_VISIBLE_DEVICES"] = ",".join(str(device) for device in devices)
    shared = {name: told[name] for name in ("world_size", "local_size", "master_addr", "master_port", "node", "nodes")}
    ranks = []
    for local_rank in range(told["local_size"]):
        place = Rendezvous(rank=told["first_rank"] + local_rank, local_rank=local_rank, **shared)
        ranks.append(Rank(number=place.rank, argv=told["argv"], environment={**base, **place.environment()}))
    return ranks


@dataclass(kw_only=True)
class _Child:
    number: int
    process: subprocess.Popen[bytes]
    note: Path
    told: bool = False  # to stop, by us


class Supervisor:
    """The ranks of one machine.

    host:   this machine's name in reports
    tell:   called with every Event
    orphan: what ranks get when the process that watches them is killed outright (Linux)
    """

    def __init__(self, host: str, tell: Callable[[Event], None], *, orphan: signal.Signals = signal.SIGTERM) -> None:
        self.host = host
        self._tell = tell
        self._orphan = orphan
        self._children: list[_Child] = []
        self._folder = Path(tempfile.mkdtemp(prefix="neox-ranks-"))
        self._signals = 0
        self._stop_at: float | None = None
        self._kill_at: float | None = None

    def start(self, ranks: Sequence[Rank], *, stdin: int | None = None) -> None:
        """Start every rank, in a session of its own: a Ctrl-C at the terminal reaches it once, through `signal`."""
        for rank in ranks:
            note = self._folder / f"rank{rank.number}.json"
            process = subprocess.Popen(
                list(rank.argv),
                env={**rank.environment, FAILURE_FILE: str(note)},
                stdin=stdin,
                start_new_session=True,
                preexec_fn=dying_with_parent(self._orphan),
            )
            self._children.append(_Child(number=rank.number, process=process, note=note))
            self._tell(Event(what="started", host=self.host, rank=rank.number, at=time.time()))

    def run(self, ranks: Sequence[Rank], received: Sequence[int], pause: Callable[[], object], *, stdin: int | None = None) -> None:
        """Start the ranks, and wait until all have ended.

        received: signals to this process, which are handed on
        pause:    waits a moment between two looks
        """
        handled = 0
        try:
            self.start(ranks, stdin=stdin)
            while self.alive():
                for signum in received[handled:]:
                    handled += 1
                    self.signal(signum)
                pause()
        finally:
            self.close()

    def signal(self, signum: int) -> None:
        """Hand a user's signal on. Ranks may take their time, but not after several signals."""
        self._signals += 1
        if self._signals > PATIENCE:
            self._kill_at = time.monotonic()
        for child in self._running():
            child.process.send_signal(signum)

    def stop(self) -> None:
        """End all ranks: another one has died, here or elsewhere, or nobody is left to report to."""
        self._stop_soon(0.0)

    def alive(self) -> bool:
        """Look after the ranks: notice deaths, and stop or kill the others when their time is over. False once all have ended."""
        for child in list(self._children):
            code = child.process.poll()
            if code is not None:
                self._children.remove(child)
                self._ended(child, code)
        now = time.monotonic()
        if self._stop_at is not None and now >= self._stop_at:
            self._stop_at = None
            self._kill_at = now + (PATIENT_LAST_S if self._signals else LAST_S)
            for child in self._running():
                child.told = True
                child.process.send_signal(signal.SIGTERM)
        if self._kill_at is not None and now >= self._kill_at:
            for child in self._running():
                child.told = True
                signal_group(child.process, signal.SIGKILL)
        return bool(self._children)

    def close(self) -> None:
        """Kill what is left and remove the folder."""
        for child in self._running():
            signal_group(child.process, signal.SIGKILL)
            child.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _stop_soon(self, seconds: float) -> None:
        """Have all ranks told to end after so long, or earlier where that was meant already."""
        at = time.monotonic() + seconds
        self._stop_at = at if self._stop_at is None else min(self._stop_at, at)

    def _running(self) -> list[_Child]:
        return [child for child in self._children if child.process.poll() is None]

    def _ended(self, child: _Child, code: int) -> None:
        event = Event(what="ended", host=self.host, rank=child.number, at=time.time(), code=code)
        if code:
            failure = read_failure(child.note, host=self.host, rank=child.number, code=code)
            # A rank that was told to end and did is no failure, unless it had words of its own, or something else killed it.
            killed = code == -signal.SIGKILL and not child.told
            quiet = not child.note.exists() and not killed and (child.told or self._signals > 0 or code in LEAVING)
            event = replace(event, what="stopped") if quiet else failure
            if self._kill_at is None:
                self._stop_soon(LEAVING_S if quiet and code in LEAVING else GRACE_S)
        # What it started itself, such as data workers, must not outlive it.
        signal_group(child.process, signal.SIGKILL)
        self._tell(event)


def signal_group(process: subprocess.Popen[bytes], signum: int) -> None:
    """Signal a process that leads a session of its own, and what it started; nothing where all of them have ended."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signum)


def dying_with_parent(signum: signal.Signals) -> Callable[[], None] | None:
    """On Linux, a start hook for Popen: the process gets `signum` when its parent is killed outright."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    set_death_signal = 1  # PR_SET_PDEATHSIG

    def hook() -> None:
        prctl(set_death_signal, int(signum))

    return hook
