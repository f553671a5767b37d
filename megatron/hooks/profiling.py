# SPDX-License-Identifier: Apache-2.0
"""The torch profiler over a few steps, written as a Chrome trace."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron.atomic_io import atomic_path
from megatron.engine.base import Engine, StepResult
from megatron.errors import ConfigError
from megatron.hooks.base import Hook, TrainState, Verdict
from megatron.log import get_logger

log = get_logger(__name__)


class ProfilingHook(Hook):
    """Profiles the steps after iteration `start` up to and with iteration `stop`.

    directory: receives `trace_rank0_iterations<start>-<stop>.json`, for chrome://tracing or Perfetto
    """

    def __init__(self, *, start: int, stop: int, directory: Path) -> None:
        self.start = start
        self.stop = stop
        self.directory = directory
        self._profiler: profile | None = None

    def on_start(self, state: TrainState, engine: Engine) -> None:
        """Begin at once when the run starts inside the window."""
        if self.start <= state.iteration < self.stop:
            self._begin()

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """Begin and end at the window's edges."""
        if self._profiler is not None and state.iteration >= self.stop:
            self._end()
        elif self._profiler is None and state.iteration == self.start < self.stop:
            self._begin()
        return Verdict.CONTINUE

    def on_stop(self, state: TrainState, engine: Engine) -> None:
        """Write what there is when the run ends inside the window."""
        self._end()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def _end(self) -> None:
        if self._profiler is None:
            return
        self._profiler.stop()
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"trace_rank0_iterations{self.start}-{self.stop}.json"
        with atomic_path(path, durable=False, suffix=".json") as aside:
            self._profiler.export_chrome_trace(str(aside))
        self._profiler = None
        log.info(f"profile written to {path}")


ENTRIES = 100_000
"""Allocations and frees that are kept: the latest so many."""


class MemoryHook(Hook):
    """Records from the start; writes a snapshot after iteration `stop`, at the end of a shorter run, or when the run fails.

    directory: receives `mem_snapshot_rank0.pickle`
    """

    def __init__(self, *, stop: int, directory: Path) -> None:
        self.stop = stop
        self.path = directory / "mem_snapshot_rank0.pickle"
        self._recording = False

    def on_start(self, state: TrainState, engine: Engine) -> None:
        """Begin. Raises ConfigError where there is no device memory to record."""
        require_cuda(engine.device)
        torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
        self._recording = True

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """Write at the end of the window."""
        if state.iteration >= self.stop:
            self._write()
        return Verdict.CONTINUE

    def on_stop(self, state: TrainState, engine: Engine) -> None:
        """Write what a short run gave."""
        self._write()

    def on_error(self, state: TrainState, error: BaseException) -> None:
        """Write: a device that ran out of memory is what this is mostly for."""
        try:
            self._write()
        except (OSError, RuntimeError) as failure:
            log.warning(f"the memory snapshot could not be written: {failure}")

    def _write(self) -> None:
        if not self._recording:
            return
        self._recording = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path, durable=False) as aside:
            torch.cuda.memory._dump_snapshot(str(aside))
            torch.cuda.memory._record_memory_history(enabled=None)
        log.info(f"memory snapshot written to {self.path}")


def require_cuda(device: torch.device) -> None:
    """Raise ConfigError where there is no device memory to record."""
    if device.type != "cuda":
        raise ConfigError(
            f"memory_profiling records the memory of CUDA devices, and this run is on {device.type}",
            where="memory_profiling",
            fix="remove memory_profiling; the memory line after the first report shows the memory of the process",
        )
