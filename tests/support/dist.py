# SPDX-License-Identifier: Apache-2.0
"""Runs one function in several new processes that can talk to each other.

Never forks the test: a fork after torch has started its threads can hang. Each rank is started by `support.forkserver`, in a process
group of its own, so that a hanging rank and everything it started can be killed.
"""

from __future__ import annotations

import inspect
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.forkserver import Forked, start
from support.tree import ROOT

POLL_S = 0.05
TAIL_LINES = 60


class DistributedFailure(AssertionError):
    """A rank failed or did not end in time; the message shows its traceback."""


@dataclass(frozen=True)
class _Rank:
    number: int
    process: Forked | subprocess.Popen[bytes]
    folder: Path

    def file(self, what: str) -> Path:
        return self.folder / f"rank{self.number}.{what}"

    def kill(self) -> None:
        """End the rank and all it started; no error when it is gone already."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self.process.kill()  # it is gone, or so new that it leads no group yet
        self.process.wait()

    def tail(self) -> str:
        log = self.file("log").read_text(errors="replace").splitlines()
        return "\n".join(log[-TAIL_LINES:])


def run_distributed(
    function: Callable[..., Any] | str,
    world: int = 2,
    timeout_s: float = 60.0,
    *,
    init: bool = True,
    env: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Call `function(rank, world, **kwargs)` in `world` new processes; returns what each rank returned.

    function: a function at the top level of a test file, or "path/of/file.py::name"
    init:     have torch.distributed (gloo) initialised before the call; False leaves it to the function
    env:      further environment of the ranks; RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set
    kwargs:   values that can be pickled; so must be what the function returns
    Raises DistributedFailure with the first failing rank's traceback, or every rank's last lines after `timeout_s`.
    """
    if isinstance(function, str):
        path, _, name = function.partition("::")
        path = str(ROOT / path)
    else:
        path, name = inspect.getfile(function), function.__qualname__
    with tempfile.TemporaryDirectory(prefix="ranks-") as temporary:
        folder = Path(temporary)
        task = {"path": path, "name": name, "kwargs": kwargs, "init": init, "timeout_s": timeout_s}
        (folder / "task").write_bytes(pickle.dumps(task))
        ranks: list[_Rank] = []
        try:
            port = free_port()
            for number in range(world):
                ranks.append(_start(number, world, port, folder, dict(env or {})))
            _wait(ranks, time.monotonic() + timeout_s, timeout_s)
            return [pickle.loads(rank.file("result").read_bytes()) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(number: int, world: int, port: int, folder: Path, env: dict[str, str]) -> _Rank:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "LOCAL_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "PYTHONFAULTHANDLER": "1",
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
        **env,
    }
    process = start(["-m", "support.rank", folder], cwd=ROOT, env=environment, log=folder / f"rank{number}.log")
    return _Rank(number, process, folder)


def _wait(ranks: list[_Rank], deadline: float, timeout_s: float) -> None:
    """Return when every rank has ended well; raise on the first that did not, or at the deadline."""
    while True:
        codes = [rank.process.poll() for rank in ranks]
        failed = [rank for rank, code in zip(ranks, codes, strict=True) if code not in (None, 0)]
        if failed:
            # A rank that lost its partner fails too: the one that failed first tells the cause.
            first = min(failed, key=lambda rank: _failed_at(rank))
            raise DistributedFailure(f"rank {first.number} of {len(ranks)} failed (exit {first.process.returncode}):\n{first.tail()}")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            tails = "\n".join(f"--- rank {rank.number} ---\n{rank.tail()}" for rank in ranks)
            raise DistributedFailure(f"{len(ranks)} ranks did not end within {timeout_s:g} s:\n{tails}")
        time.sleep(POLL_S)


def _failed_at(rank: _Rank) -> int:
    """In nanoseconds; 0 for a rank that could not say it: one that died takes its partners along."""
    mark = rank.file("failed")
    return int(mark.read_text()) if mark.exists() else 0
