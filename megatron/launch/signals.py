# SPDX-License-Identifier: Apache-2.0
"""Signals that are written down instead of ending the process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = ("SIGTERM", "SIGINT", "SIGUSR1")
"""What a run is asked to save and leave with: by a person, by a launcher, or by Slurm (sbatch --signal)."""

HANDED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
"""What a launcher and its agents hand on to ranks."""


def note_signals(names: Sequence[str] = STOPPING, *, insisting: bool = False) -> list[int]:
    """As `noting_signals`, to the process's end: a signal while it clears up must not change its exit status."""
    received: list[int] = []
    _install(names, received, insisting=insisting)
    return received


@contextmanager
def noting_signals(names: Sequence[str] = STOPPING, *, insisting: bool = False) -> Iterator[list[int]]:
    """Within, signals are only written down, in the list that is given.

    insisting: a second SIGINT is a KeyboardInterrupt: the person at the terminal does not want to wait
    Outside the main thread, which alone may do so, nothing is changed.
    """
    received: list[int] = []
    before = _install(names, received, insisting=insisting)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _install(names: Sequence[str], received: list[int], *, insisting: bool) -> dict[int, Any]:
    """Have signals written to `received`; what each of them meant before."""
    owner = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            # A forked child, such as a data worker, has nothing to keep and must end when it is told to.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if insisting and number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return {number: signal.signal(number, note) for number in numbers}
