# SPDX-License-Identifier: Apache-2.0
"""Starts the export of checkpoints with a run, counts its failures, and ends it. Knows not what they are exported to."""

from __future__ import annotations

from collections.abc import Callable

from megatron.checkpoint.conversion.exporting.exporter import Exporter
from megatron.engine.base import Engine, StepResult
from megatron.hooks.base import BaseHook, TrainState, Verdict
from megatron.hooks.norms import Send

EARLY_S = 10.0
"""A run that was told to stop is started again and goes on with its exports then: it leaves within its time of grace."""


class ExportHook(BaseHook):
    """Stands behind the last save of a run.

    report:  takes numbers for the trackers and for a step's row
    hurried: whether the process was told to end
    """

    def __init__(self, exporter: Exporter, *, report: Send, hurried: Callable[[], bool]) -> None:
        self.exporter = exporter
        self.report = report
        self.hurried = hurried

    def on_start(self, state: TrainState, engine: Engine) -> None:
        """Take up what an earlier start left."""
        self.exporter.start()

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """Tell the failures so far; they are in the next step's row."""
        failures = float(self.exporter.failures)
        self.report({"checkpoint/export_failures": failures}, {"export_failures": failures})
        return Verdict.CONTINUE

    def on_stop(self, state: TrainState, engine: Engine) -> None:
        """Wait until everything is there, or until the next start has to do it."""
        self.exporter.drain(hurried=self.hurried, early_s=EARLY_S)

    def on_error(self, state: TrainState, error: BaseException) -> None:
        """Leave the rest to the next start."""
        self.exporter.stop()
