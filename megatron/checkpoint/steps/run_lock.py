# SPDX-License-Identifier: Apache-2.0
"""A run's lock on the folder it writes to: `run.lock`, a file that says who holds it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from uuid import uuid4

from megatron.atomic_io import sync_folder
from megatron.errors import ConfigError, TrainingError
from megatron.launch.heartbeat import FOLDER as HEARTBEATS
from megatron.log import get_logger

log = get_logger(__name__)

LOCK = "run.lock"
REFRESHED_EVERY_S = 30.0
# A holder on another host whose lock was not touched for so long is taken for dead.
STALE_AFTER_S = 600.0
# Where a file system has no hard links, a lock may be seen between its making and its filling.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_HALF_WRITTEN_S = 5.0
_POLL_S = 0.05
_TRIED_FOR_S = 3 * _HALF_WRITTEN_S


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process as others can recognise it.

    place:   boot and process namespace: equal numbers mean the same process only within one
    started: clock ticks from boot to the process's start (/proc/<pid>/stat, field 22); None where there is no /proc
    since:   when it took the lock, for people
    job, restarts: of Slurm, which runs a job once at a time: after a restart, the earlier life is over wherever it was
    """

    host: str
    pid: int
    place: str
    started: int | None
    since: str
    job: str = ""
    restarts: int = 0
    token: str = field(default_factory=lambda: uuid4().hex)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def this_process() -> Holder:
    """The calling process as a holder."""
    pid, now = os.getpid(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return Holder(
        host=os.uname().nodename,
        pid=pid,
        place=_place(),
        started=process_start(pid),
        since=now,
        job=os.environ.get("SLURM_JOB_ID", ""),
        restarts=int(restarts) if restarts.isdecimal() else 0,
    )


class RunLock:
    """A lock that this process holds; a thread keeps its time fresh as long as the process lives."""

    def __init__(self, path: Path, holder: Holder, *, every_s: float = REFRESHED_EVERY_S) -> None:
        self.path = path
        self.holder = holder
        self._every_s = every_s
        self._ended = threading.Event()
        self._lost: Holder | None = None
        threading.Thread(target=self._refresh, name="run lock", daemon=True).start()

    def check(self) -> None:
        """Raise TrainingError when another run has taken the lock over: two runs must not write to one folder."""
        if self._lost is not None:
            what = f"another run took over the folder while this process did not respond: {self._lost}"
            raise TrainingError(what, where=str(self.path), fix="leave the folder to that run; nothing was written to it since")

    def release(self) -> None:
        """Remove the file, unless it is another run's by now."""
        self._ended.set()
        if _holder_of(self.path) == self.holder:
            self.path.unlink(missing_ok=True)

    def _refresh(self) -> None:
        while not self._ended.wait(self._every_s):
            # A file system that is away for a moment is no reason to end; a lock that is another's is.
            with suppress(OSError):
                found = _holder_of(self.path)
                if found is not None and found != self.holder:
                    self._lost = found
                    return
                os.utime(self.path)


@contextmanager
def held(directory: Path) -> Iterator[RunLock]:
    """Hold the lock of `directory`, made if need be, until the block is left. A folder that it made and did not use is removed.

    Raises ConfigError when another run holds it, or when it cannot be written.
    """
    made = not directory.exists()
    lock = acquire(directory)
    try:
        yield lock
    finally:
        lock.release()
        if made:
            with suppress(OSError):
                # Heartbeats of a run that never began tell nothing.
                if {entry.name for entry in directory.iterdir()} <= {HEARTBEATS}:
                    shutil.rmtree(directory)


def acquire(directory: Path) -> RunLock:
    """Take the lock of `directory`, also from a process that is gone. Raises ConfigError when another run holds it."""
    path, me = directory / LOCK, this_process()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + _TRIED_FOR_S
        while time.monotonic() < deadline:
            if _create(path, me):
                sync_folder(directory)
                return RunLock(path, me)
            holder = _holder_of(path)
            if holder is None:
                _forget_half_written(path)
            elif _alive(holder, path, me):
                fix = f"wait until it has ended, or choose another `save`; if that run is gone for certain, remove {path}"
                raise ConfigError(f"another run writes to this folder: {holder}", where=str(path), fix=fix)
            elif _take_away(path, holder):
                log.warning("took over %s from a run that is gone: %s", path, holder)
    except OSError as error:
        raise ConfigError(f"`save` cannot be written to: {error}", where=str(directory), fix="choose another `save`") from error
    raise ConfigError("the lock file changes all the time", where=str(path), fix="look which runs use this folder, then start again")


def process_start(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot; None when there is none (or one that is dead and not yet waited for)."""
    try:
        # The name of the program, in parentheses, may hold anything.
        after_name = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if after_name[0] in "ZX" else int(after_name[19])


def _alive(holder: Holder, path: Path, me: Holder) -> bool:
    if holder.job and holder.job == me.job and holder.restarts < me.restarts:
        return False
    if (holder.host, holder.place) == (me.host, me.place) and holder.started is not None:
        return process_start(holder.pid) == holder.started
    return _age_s(path) < STALE_AFTER_S


def _age_s(path: Path) -> float:
    """For how long a file was not touched, by the clock of its file system: hosts' clocks differ, and may be set back."""
    probe = path.with_name(f"{path.name}.{uuid4().hex[:8]}")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _create(path: Path, holder: Holder) -> bool:
    """Make the lock, content and all at once, unless there is one."""
    content = json.dumps(asdict(holder)).encode()
    mine = path.with_name(f"{path.name}.{uuid4().hex[:8]}")
    try:
        _write_new(mine, content)
        os.link(mine, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _write_new(path, content)
    finally:
        mine.unlink(missing_ok=True)
    return True


def _write_new(path: Path, content: bytes) -> bool:
    try:
        with open(path, "xb", buffering=0, opener=partial(os.open, mode=0o644)) as file:
            file.write(content)
            os.fsync(file)
    except FileExistsError:
        return False
    return True


def _holder_of(path: Path) -> Holder | None:
    """Who a lock names; None when it is gone or not (yet) filled."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _forget_half_written(path: Path) -> None:
    time.sleep(_POLL_S)
    if path.exists() and _holder_of(path) is None and _age_s(path) > _HALF_WRITTEN_S:
        path.unlink(missing_ok=True)


def _take_away(path: Path, stale: Holder) -> bool:
    """Remove the lock of a holder that is gone; False when somebody else was quicker.

    Only one of several that try can rename the file, and it looks at what it got: a lock taken in between is put back.
    """
    if _holder_of(path) != stale:
        return False
    mine = path.with_name(f"{path.name}.{uuid4().hex[:8]}")
    try:
        path.rename(mine)
    except FileNotFoundError:
        return False
    found = _holder_of(mine)
    mine.unlink(missing_ok=True)
    if found is not None and found != stale:
        _create(path, found)
        return False
    return True


def _place() -> str:
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
