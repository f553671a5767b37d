# SPDX-License-Identifier: Apache-2.0
"""What a rank is doing: told by its loop, read by its watch. Knows no files and no other rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

SETUP, STEP, EVALUATE, SAVE, LOAD, ENDED, FAILED = "setup", "step", "evaluate", "save", "load", "ended", "failed"
OVER = (ENDED, FAILED)


class Pulse:
    """Step, phase and a count of moves. One thread writes, others read; each field alone is enough for them, so no lock is held.

    moves: grows with every sign of progress: a step, a micro batch, a batch of an evaluation, a phase
    warm:  the first step is done; before, kernels are compiled and index maps built
    """

    def __init__(self) -> None:
        self.step = 0
        self.phase = SETUP
        self.moves = 0
        self.warm = False

    def beat(self) -> None:
        """There is progress."""
        self.moves += 1

    def begin_step(self, number: int) -> None:
        """Optimizer step `number`, counted from 1, begins."""
        self.step, self.phase = number, STEP
        self.beat()

    def end_step(self) -> None:
        """It is done."""
        self.warm = True
        self.beat()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What is inside is `phase`."""
        before, self.phase = self.phase, phase
        self.beat()
        try:
            yield
        finally:
            self.phase = before
            self.beat()

    def counted(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; each taken is progress."""
        for item in items:
            self.beat()
            yield item
