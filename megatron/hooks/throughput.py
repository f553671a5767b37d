# SPDX-License-Identifier: Apache-2.0
"""Rates: samples, tokens and FLOPs per second, over one step or an interval."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megatron.engine.base import StepResult


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """FLOPs of one optimizer step over all devices.

    hardware:    with the forward passes that activation checkpointing repeats
    model:       without them
    devices:     how many share the work
    peak_tflops: of one device; None = not known, so no utilization is given
    """

    hardware: float = 0.0
    model: float = 0.0
    devices: int = 1
    peak_tflops: float | None = None

    def per_device(self, seconds: float) -> float:
        """FLOP/s of one device at `seconds` per step."""
        return _rate(self.hardware, seconds) / self.devices

    def mfu(self, seconds: float) -> float | None:
        """Model FLOPs utilization in percent (Chowdhery et al., arXiv 2204.02311, app. B)."""
        return self._percent(self.model, seconds)

    def hfu(self, seconds: float) -> float | None:
        """Hardware FLOPs utilization in percent."""
        return self._percent(self.hardware, seconds)

    def _percent(self, flops: float, seconds: float) -> float | None:
        if not self.peak_tflops:
            return None
        return _rate(flops, seconds) / self.devices / (self.peak_tflops * 1e12) * 100.0


@dataclass
class Interval:
    """Sums over the steps since the last line."""

    steps: int = 0
    seconds: float = 0.0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    nan: int = 0
    _sums: dict[str, float] = field(default_factory=dict)
    _timings: dict[str, float] = field(default_factory=dict)

    def add(self, result: StepResult) -> None:
        """Count one step; a skipped step adds its time, but nothing to the means."""
        self.steps += 1
        self.seconds += result.seconds
        self.samples += result.samples
        self.tokens += result.tokens
        self.skipped += result.skipped
        self.nan += not all(math.isfinite(value) for value in result.metrics.values())
        for name, value in result.metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + (0.0 if result.skipped else value)
        for name, seconds in result.timings.items():
            self._timings[name] = self._timings.get(name, 0.0) + seconds

    def mean_timings(self) -> dict[str, float]:
        """Phase -> its seconds per step."""
        return {name: total / max(1, self.steps) for name, total in self._timings.items()}

    def means(self) -> dict[str, float]:
        """Name -> mean over the steps that were applied."""
        applied = max(1, self.steps - self.skipped)
        return {name: total / applied for name, total in self._sums.items()}

    @property
    def seconds_per_step(self) -> float:
        """Mean wall time of a step."""
        return self.seconds / max(1, self.steps)

    @property
    def samples_per_second(self) -> float:
        """Over all data ranks."""
        return _rate(self.samples, self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Over all data ranks."""
        return _rate(self.tokens, self.seconds)


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
