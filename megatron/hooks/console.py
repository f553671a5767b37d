# SPDX-License-Identifier: Apache-2.0
"""What a person watching sees: the training line, a live bar on a terminal, a copy in a folder."""

from __future__ import annotations

import logging
import resource
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron.engine.base import Engine, StepResult
from megatron.hooks.base import Hook, TrainState, Verdict
from megatron.hooks.metrics import Interval, StepFlops
from megatron.log import ROOT, get_logger
from megatron.progress import MemoryLine, TrainingLine, format_memory, format_times, format_training

log = get_logger(__name__)
_MIB = 1024.0 * 1024.0


class ConsoleHook(Hook):
    """Logs one training line every `log_interval` steps and the memory once.

    live: keep a progress bar with the time left beneath the lines (terminals only)
    """

    def __init__(self, *, log_interval: int, flops: StepFlops, live: bool = False, stream: TextIO | None = None) -> None:
        self.log_interval = log_interval
        self.flops = flops
        self.live = live
        self.stream = stream
        self._interval = Interval()
        self._memory_shown = False
        self._bar: tqdm[NoReturn] | None = None
        self._open = ExitStack()

    def on_start(self, state: TrainState, engine: Engine) -> None:
        """Open the bar."""
        if not self.live:
            return
        # Lines of the log are printed above the bar, which then draws itself again.
        self._open.enter_context(logging_redirect_tqdm(loggers=[logging.getLogger(ROOT)]))
        shown: dict[str, Any] = {"file": self.stream or sys.stdout, "unit": "it", "dynamic_ncols": True, "leave": False, "disable": False}
        self._bar = self._open.enter_context(tqdm(total=state.target, initial=state.iteration, **shown))

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """Count the step; at the end of an interval, say how it went."""
        self._interval.add(result)
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.4f}" for name, value in result.metrics.items()}, refresh=False)
            self._bar.update(1)
        if state.iteration % self.log_interval == 0:
            log.info(format_training(self._line(state, result)))
            times = self._interval.mean_timings()
            if times:
                log.info(format_times({name: 1000.0 * seconds for name, seconds in times.items()}))
            self._interval = Interval()
            if not self._memory_shown:
                log.info(format_memory(memory(state.iteration, engine.device)))
                self._memory_shown = True
        return Verdict.CONTINUE

    def on_stop(self, state: TrainState, engine: Engine) -> None:
        """Close the bar."""
        self._open.close()

    def on_error(self, state: TrainState, error: BaseException) -> None:
        """Close the bar, so that the error stands on a line of its own."""
        self._open.close()

    def _line(self, state: TrainState, result: StepResult) -> TrainingLine:
        interval = self._interval
        seconds = interval.seconds_per_step
        return TrainingLine(
            samples_per_second=interval.samples_per_second,
            iteration=state.iteration,
            train_iters=state.target,
            elapsed_ms=seconds * 1000.0,
            learning_rate=result.learning_rate,
            flops=self.flops.per_device(seconds),
            mfu=self.flops.mfu(seconds),
            hfu=self.flops.hfu(seconds),
            losses=interval.means(),
            loss_scale=result.loss_scale,
            skipped=interval.skipped,
            nan=interval.nan,
        )


def memory(iterations: int, device: torch.device) -> MemoryLine:
    """Memory of `device` in MiB; on the CPU that of the process, where "allocated" and "reserved" are both its resident size."""
    if device.type == "cuda":
        cuda = torch.cuda
        figures = (cuda.memory_allocated, cuda.max_memory_allocated, cuda.memory_reserved, cuda.max_memory_reserved)
        return MemoryLine(iterations, *(figure(device) / _MIB for figure in figures))
    # Linux counts in KiB, macOS in bytes.
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0) / _MIB
    resident = _resident() or highest
    highest = max(highest, resident)
    return MemoryLine(iterations, resident, highest, resident, highest)


def _resident() -> float | None:
    """Resident size of this process in MiB, where the system tells."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * resource.getpagesize() / _MIB if path.exists() else None


def tee_log(directory: Path) -> None:
    """Also append every log line of this process to `<host>_stdout.txt` in `directory`, warnings to `<host>_stderr.txt` too.

    Lines of earlier runs stay. Calling it again for the same folder changes nothing.
    """
    logger = logging.getLogger(ROOT)
    directory.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    opened = {handler.baseFilename for handler in logger.handlers if isinstance(handler, logging.FileHandler)}
    console = next((handler for handler in logger.handlers if not isinstance(handler, logging.FileHandler)), None)
    for name, level in ((f"{host}_stdout.txt", logging.NOTSET), (f"{host}_stderr.txt", logging.WARNING)):
        if str((directory / name).resolve()) in opened:
            continue
        handler = logging.FileHandler((directory / name).resolve(), mode="a", encoding="utf-8", delay=True)
        handler.setLevel(level)
        if console is not None:
            handler.setFormatter(console.formatter)
            for condition in console.filters:
                handler.addFilter(condition)
        logger.addHandler(handler)
