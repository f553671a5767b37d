# SPDX-License-Identifier: Apache-2.0
"""Signals that are written down instead of ending the process. Knows nothing of what is done about them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

STOPPING = ("SIGTERM", "SIGINT", "SIGUSR1")
"""What a run is asked to save and leave with: by a person, by a launcher, or by Slurm (sbatch --signal)."""


@contextmanager
def noting_signals(names: Sequence[str] = STOPPING, *, insisting: bool = False) -> Iterator[list[int]]:
    """Within, signals are only written down, in the list that is given.

    insisting: a second SIGINT is a KeyboardInterrupt: the person at the terminal does not want to wait
    Outside the main thread, which alone may do so, nothing is changed.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if insisting and number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
