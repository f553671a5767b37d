# SPDX-License-Identifier: Apache-2.0
"""Signals that ask this process to stop: written down, for whoever looks at the next good moment. Knows no other process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from megatron.errors import ExitCode

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """What this process was told by signals.

    received:  the last signal; None while there was none
    cut_short: somebody left work unfinished because of it
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.cut_short = False
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """From here on signals are only written down. A second Ctrl-C interrupts all the same."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def restore(self) -> None:
        """Signals mean again what they meant before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Listen within."""
        self.listen()
        try:
            yield self
        finally:
            self.restore()

    def cut(self) -> bool:
        """Whether to stop; who is told so leaves its work unfinished."""
        self.cut_short = self.cut_short or self.received is not None
        return self.cut_short

    def outcome(self, *, progress: bool) -> ExitCode:
        """How a process that works alone ends; progress: something was finished and kept."""
        if not self.cut_short:
            return ExitCode.DONE
        if self.received == signal.SIGINT:
            return ExitCode.INTERRUPTED
        return ExitCode.REQUEUE if progress else ExitCode.NO_PROGRESS

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A child that was forked, such as a data worker, has nothing to save and must end when told to.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: the user does not want to wait
        self.received = signal.Signals(number)
