# SPDX-License-Identifier: Apache-2.0
"""Seconds that the phases of a step take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


class Timers:
    """Sums seconds by name; does nothing, and waits for no device, unless `enabled`.

    >>> clock = iter([1.0, 3.0, 5.0, 6.0, 7.0, 7.0])
    >>> timers = Timers(enabled=True, clock=lambda: next(clock))
    >>> with timers("forward"): pass
    >>> list(timers.over("batch generator", iter("a"))), timers.take(), timers.take()
    (['a'], {'forward': 2.0, 'batch generator': 1.0}, {})
    """

    def __init__(
        self, device: torch.device | None = None, *, enabled: bool = False, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.enabled = enabled
        self._device = device
        self._clock = clock
        self._sums: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time the body takes. The device is waited for on both sides, so that its work counts where it was asked for."""
        if not self.enabled:
            yield
            return
        started = self._now()
        yield
        self._sums[name] = self._sums.get(name, 0.0) + self._now() - started

    def over(self, name: str, items: Iterator[T]) -> Iterator[T]:
        """`items`, with the time that each of them takes to come."""
        while True:
            with self(name):
                item = next(items, None)
            if item is None:
                return
            yield item

    def take(self) -> dict[str, float]:
        """Name -> seconds since the last call."""
        sums, self._sums = self._sums, {}
        return sums

    def _now(self) -> float:
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()
