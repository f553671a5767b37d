# SPDX-License-Identifier: Apache-2.0
"""Work beside the training, in a thread of its own, on items that are marked in a folder: after a crash the marks are still there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence


class BackgroundQueue:
    """Works off what is pending, one item at a time, whenever it is woken; what failed is pending still, and is tried at the next waking.

    name:    of the thread, which does not keep the process from ending
    pending: names of the marked items, in order
    attempt: does one item and takes its mark away; deals with its own errors
    """

    def __init__(self, name: str, pending: Callable[[], Sequence[str]], attempt: Callable[[str], None]) -> None:
        self.pending = pending
        self.stopped = False
        self._attempt = attempt
        self._wanted = threading.Event()
        self._idle = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    @property
    def busy(self) -> bool:
        """Whether the thread is alive and has not got through what it was woken for."""
        return self._thread.is_alive() and not self._idle.is_set()

    def start(self) -> None:
        """Begin, with what an earlier process left."""
        self._wanted.set()
        self._thread.start()

    def wake(self) -> None:
        """There is more; returns at once."""
        with self._lock:
            self._idle.clear()
            self._wanted.set()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until everything was attempted; returns whether it was."""
        return self._idle.wait(timeout_s)

    def drain(
        self,
        *,
        hurried: Callable[[], bool] = lambda: False,
        early_s: float = 0.0,
        patience_s: float = float("inf"),
        progress: Callable[[], int] = lambda: 0,
        report: Callable[[], None] = lambda: None,
        report_s: float = 15.0,
    ) -> bool:
        """Wait until nothing is pending; returns whether nothing is. The thread has ended, or ends with the process.

        hurried:    whether the process was told to end; then it waits no longer than early_s from there
        patience_s: give up when `progress` does not change for so long
        report:     called every report_s seconds
        """
        reported_at = moved_at = time.monotonic()
        deadline, moved = float("inf"), progress()
        while self._thread.is_alive() and not self._idle.wait(0.1):
            now = time.monotonic()
            if progress() != moved:
                moved, moved_at = progress(), now
            if now - reported_at >= report_s:
                reported_at = now
                report()
            if deadline == float("inf") and hurried():
                deadline = now + early_s
            if now - moved_at > patience_s or now >= deadline:
                break
        self.stop()
        return not self.pending()

    def stop(self) -> None:
        """Begin no further item."""
        self.stopped = True
        self._wanted.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end after `stop`; returns whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            self._wanted.wait()
            if self.stopped:
                return
            self._wanted.clear()
            for item in self.pending():
                if self.stopped:
                    return
                self._attempt(item)
            with self._lock:
                if not self._wanted.is_set():
                    self._idle.set()
