# SPDX-License-Identifier: Apache-2.0
"""Every step's numbers to `metrics.jsonl` and to the trackers, and throughput: samples, tokens and FLOPs per second."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.engine.base import Engine, StepResult
from megatron.hooks.base import Hook, TrainState, Verdict
from megatron.hooks.trackers import Guarded, Opener
from megatron.log import get_logger

log = get_logger(__name__)


class MetricsHook(Hook):
    """Writes a row each step, rates every `log_interval` steps, and evaluations through `report`.

    file:    metrics.jsonl; None = there is no place for it
    openers: name -> opener of a tracker, opened at the start of training
    """

    def __init__(
        self, *, log_interval: int, flops: StepFlops, file: MetricsFile | None, openers: Mapping[str, Opener] | None = None
    ) -> None:
        self.log_interval = log_interval
        self.flops = flops
        self.file = file
        self.openers = dict(openers or {})
        self._interval = Interval()
        self._sinks: Sequence[Guarded] = ()
        self._values: dict[str, float] = {}
        self._columns: dict[str, float] = {}

    def attach(self, values: Mapping[str, float], row: Mapping[str, float]) -> None:
        """Further numbers of the step under way, from a hook that stands before this one: for the trackers, and for the row."""
        self._values |= values
        self._columns |= row

    def on_start(self, state: TrainState, engine: Engine) -> None:
        """Open the trackers."""
        self._sinks = [Guarded(name, opener(state.iteration)) for name, opener in self.openers.items()]

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """Write the step's row."""
        self._interval.add(result)
        attached, self._values = self._values, {}
        columns, self._columns = self._columns, {}
        if self.file is not None:
            self.file.write(self._row(state, result) | columns)
        if self._sinks:
            values = step_values(result) | timer_values(self._interval) | attached
            if state.iteration % self.log_interval == 0:
                values |= rate_values(self._interval, self.flops)
            self._send(values, state.iteration)
        if state.iteration % self.log_interval == 0:
            self._interval = Interval()
        return Verdict.CONTINUE

    def report(self, split: str, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Results of an evaluation: split is "valid" or "test"."""
        if self.file is not None:
            named = {f"{split}_{name}": value for name, value in metrics.items()}
            self.file.write({"iteration": state.iteration, **named, "time": time.time()})
        chart = "validation" if split == "valid" else split
        self._send({f"{chart}/{_plain(name)}": value for name, value in metrics.items()}, state.iteration)

    def close(self, *, failed: bool) -> None:
        """Close file and trackers."""
        for sink in self._sinks:
            sink.close(failed=failed)
        self._sinks = ()
        if self.file is not None:
            self.file.close()

    def on_error(self, state: TrainState, error: BaseException) -> None:
        """Close; the run did not end well."""
        self.close(failed=True)

    def _send(self, values: Mapping[str, float], step: int) -> None:
        for sink in self._sinks:
            sink.write(values, step)

    def _row(self, state: TrainState, result: StepResult) -> dict[str, float | int | bool | None]:
        row: dict[str, float | int | bool | None] = {
            "iteration": state.iteration,
            **result.metrics,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens_per_second": result.tokens / result.seconds if result.seconds > 0 else None,
            "mfu": self.flops.mfu(result.seconds),
            "samples": state.samples,
            "tokens": state.tokens,
            "seconds": result.seconds,
            "time": time.time(),
        }
        if result.padding:
            row["padding"] = result.padding
        if result.loss_scale is not None:
            row |= {"loss_scale": result.loss_scale, "skipped": result.skipped}
        row |= {f"seconds_{name.replace(' ', '_')}": seconds for name, seconds in result.timings.items()}
        return row


class ClosingHook(Hook):
    """Stands last in the list: closes the metrics after the final evaluation has reported."""

    def __init__(self, metrics: MetricsHook) -> None:
        self.metrics = metrics

    def on_stop(self, state: TrainState, engine: Engine) -> None:
        """Close file and trackers."""
        self.metrics.close(failed=False)


def step_values(result: StepResult) -> dict[str, float]:
    """What trackers get every step."""
    values = {"train/learning_rate": result.learning_rate}
    values |= {f"train/{_plain(name)}": value for name, value in result.metrics.items()}
    if result.loss_scale is not None:
        values["train/loss_scale"] = result.loss_scale
    if result.grad_norm is not None:
        values["train/grad_norm"] = result.grad_norm
    return values


def timer_values(interval: Interval) -> dict[str, float]:
    """Seconds per step of each timed phase, over the steps of the interval so far."""
    return {f"timers/{name}": seconds for name, seconds in interval.mean_timings().items()}


def rate_values(interval: Interval, flops: StepFlops) -> dict[str, float]:
    """What trackers get every `log_interval` steps."""
    seconds = interval.seconds_per_step
    values = {
        "runtime/samples_per_sec": interval.samples_per_second,
        "runtime/iteration_time": seconds,
        "runtime/steps_per_sec": 1.0 / seconds if seconds > 0 else 0.0,
        "runtime/tokens_per_sec": interval.tokens_per_second,
        "runtime/flops_per_sec_per_gpu": flops.per_device(seconds),
    }
    mfu, hfu = flops.mfu(seconds), flops.hfu(seconds)
    if mfu is not None and hfu is not None:
        values |= {"runtime/model_flops_utilization": mfu, "runtime/hardware_flops_utilization": hfu}
    return values


def _plain(name: str) -> str:
    return name.replace(" ", "_")


NAME = "metrics.jsonl"


class MetricsFile:
    """Appends rows; a line torn by a crash is removed first."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _mend_tail(path)
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; it is in the operating system's hands when this returns."""
        clean = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; closing twice does no harm."""
        self._file.close()


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "iteration" in row else None


def _mend_tail(path: Path) -> None:
    """End the file with a whole line: complete a row that lacks only its newline, cut off a torn one."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - (1 << 20))
        file.seek(start)
        tail = file.read()
        if tail.endswith(b"\n"):
            return
        cut = tail.rfind(b"\n") + 1
        if _parse(tail[cut:].decode("utf-8", "replace")) is not None:
            file.write(b"\n")
        else:
            file.truncate(start + cut)


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
