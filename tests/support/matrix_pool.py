# SPDX-License-Identifier: Apache-2.0
"""Servers that run jobs side by side, each job with a hard time limit. Imports no torch."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from support.dist import ROOT
from support.matrix_job import Failure, Job

START_S = 120.0
GRACE_S = 10.0
"""The server ends a job at its limit; so much later the server itself is ended."""


class Server:
    """One `support.matrix_server`; a new one is started for the job after one that it did not survive."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="matrix-")
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: Connection | None = None

    def run(self, job: Job) -> Any:
        """What rank 0 returned, or a Failure."""
        requests = self._started()
        if requests is None:
            return Failure("the server did not start", self._log())
        try:
            requests.send(tuple(job))
            if requests.poll(job.timeout_s + GRACE_S):
                return requests.recv()
        except (EOFError, OSError):
            pass
        self.close()
        return Failure("the server ended, or did not answer in time", self._log())

    def close(self) -> None:
        """End the server; its ranks die with it."""
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        self._process = None
        if self._requests is not None:
            self._requests.close()

    def _started(self) -> Connection | None:
        if self._process is not None:
            return self._requests
        ours, theirs = socket.socketpair()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
        }
        with open(Path(self._folder.name) / "server.log", "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "support.matrix_server", str(theirs.fileno()), self._folder.name],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
            )
        theirs.close()
        self._requests = Connection(ours.detach())
        try:
            if self._requests.poll(START_S) and self._requests.recv() == "ready":
                return self._requests
        except (EOFError, OSError):
            pass
        self.close()
        return None

    def _log(self) -> str:
        log = Path(self._folder.name) / "server.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-30:]) if log.exists() else ""


class Pool:
    """Some servers, each fed by a thread of its own. Use as a context manager.

    The threads last as long as the pool: to Linux a process's parent is the thread that started it, with which it would end.
    """

    def __init__(self, servers: int) -> None:
        self._todo: queue.SimpleQueue[tuple[int, Job] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._servers = [Server() for _ in range(servers)]
        self._threads = [threading.Thread(target=self._serve, args=(server,), daemon=True) for server in self._servers]

    def __enter__(self) -> Pool:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for _ in self._threads:
            self._todo.put(None)
        for server in self._servers:
            server.close()
        for thread in self._threads:
            thread.join()

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        """(index of the job, what its rank 0 returned or a Failure), as they end."""
        for item in enumerate(jobs):
            self._todo.put(item)
        for _ in jobs:
            yield self._done.get()

    def _serve(self, server: Server) -> None:
        while (item := self._todo.get()) is not None:
            index, job = item
            try:
                answer = server.run(job)
            except Exception as error:  # whatever it is, the one who waits must hear of it
                answer = Failure(f"{type(error).__name__}: {error}")
            self._done.put((index, answer))
