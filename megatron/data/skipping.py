# SPDX-License-Identifier: Apache-2.0
"""Samples that a run leaves out. A position counts the samples that were trained on; a number is a sample's place in the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Skipped:
    """Ranges [start, end) of sample numbers, in order, that do not touch.

    >>> skipped = Skipped().with_ranges([(8, 12), (4, 6)])
    >>> [skipped.number(position) for position in range(8)]
    [0, 1, 2, 3, 6, 7, 12, 13]
    >>> skipped.numbers(2, 7)
    [(2, 4), (6, 8), (12, 13)]
    """

    ranges: tuple[tuple[int, int], ...] = ()

    def with_ranges(self, more: Iterable[tuple[int, int]]) -> Skipped:
        """These and more."""
        joined: list[tuple[int, int]] = []
        for start, end in sorted([*self.ranges, *more]):
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            elif start < end:
                joined.append((start, end))
        return Skipped(tuple(joined))

    def number(self, position: int) -> int:
        """The number of the sample at a position."""
        for start, end in self.ranges:
            if position < start:
                break
            position += end - start
        return position

    def numbers(self, start: int, end: int) -> list[tuple[int, int]]:
        """The numbers of the samples at positions [start, end), as ranges [start, end)."""
        found: list[tuple[int, int]] = []
        position, number = 0, 0  # where the samples between two ranges begin
        for low, high in (*self.ranges, (None, 0)):
            length = end if low is None else low - number
            first, last = max(start, position), min(end, position + length)
            if first < last:
                found.append((number + first - position, number + last - position))
            position, number = position + length, high
        return found

    def positions(self, size: int) -> int:
        """How many positions `size` samples have."""
        return size - sum(max(0, min(end, size) - start) for start, end in self.ranges)
