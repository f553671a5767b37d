# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints become Hugging Face folders, and when: beside the training, and across starts. Knows no tensor."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron.atomic_io import write_durably
from megatron.checkpoint.conversion.exporting.hf_export import Export
from megatron.checkpoint.steps.commit import recover
from megatron.checkpoint.steps.retention import EXPORTING
from megatron.checkpoint.steps.step_dirs import step_of
from megatron.hub.background_queue import BackgroundQueue
from megatron.log import get_logger

log = get_logger(__name__)

FOLDER = "hf"
"""Beside the checkpoints; in it a folder for each exported one, under the same name."""

PROGRESS_S = 15.0


class Exporter:
    """Exports published checkpoints of one run, in a thread of its own. The markers are its queue.

    directory: `save`
    every:     checkpoints whose step is a multiple of it; 1 = all
    failures:  exports that were given up so far: they keep no checkpoint from being deleted
    """

    def __init__(self, directory: Path, export: Export, *, every: int = 1) -> None:
        self.directory = directory
        self.export = export
        self.every = every
        self.failures = 0
        self._queue = BackgroundQueue("export", self._left, self._attempt)

    def start(self) -> None:
        """Begin; what an earlier start left is taken up."""
        for line in recover(self.directory / FOLDER):
            log.warning("%s: %s", self.directory / FOLDER, line)
        self._queue.start()

    def published(self, folder: Path) -> None:
        """A checkpoint has got its name; returns at once."""
        step = step_of(folder.name)
        if step is None or step % self.every:
            return
        try:
            marker = self.directory / EXPORTING / folder.name
            marker.parent.mkdir(exist_ok=True)
            write_durably(marker, "")
        except OSError as error:  # a full disk, say: the checkpoint is there, and training goes on
            self._failed(folder.name, error)
            return
        self._queue.wake()

    def drain(self, *, hurried: Callable[[], bool] = lambda: False, early_s: float = 0.0) -> bool:
        """Wait until everything is exported; returns whether it is. The thread has ended, or ends with the process.

        hurried: whether the process was told to end; then it waits no longer than early_s from there
        """
        if self._queue.busy:
            log.info("waiting for the export of %s", ", ".join(self._left()) or "nothing")
        done = self._queue.drain(hurried=hurried, early_s=early_s, report=self._report, report_s=PROGRESS_S)
        if not done:
            log.error("not exported yet: %s; the next start of this run does it", ", ".join(self._left()))
        return done

    def stop(self) -> None:
        """Begin no further one."""
        self._queue.stop()

    def _report(self) -> None:
        log.info("  still exporting %s", ", ".join(self._left()))

    def _left(self) -> list[str]:
        place = self.directory / EXPORTING
        names = [entry.name for entry in place.iterdir()] if place.is_dir() else []
        return sorted((name for name in names if step_of(name) is not None), key=lambda name: step_of(name) or 0)

    def _attempt(self, tag: str) -> None:
        step, marker = self.directory / tag, self.directory / EXPORTING / tag
        try:
            if step.is_dir():
                out, began = self.directory / FOLDER / tag, time.monotonic()
                out.parent.mkdir(exist_ok=True)
                self.export.write(step, out)
                log.info("  exported %s as %s in %.1f s", out, self.export.family.hf, time.monotonic() - began)
            else:
                log.warning("%s was deleted before it was exported", step)
        except Exception as error:  # whatever fails here must not end a training run
            self._failed(tag, error)
        with suppress(OSError):
            marker.unlink(missing_ok=True)

    def _failed(self, tag: str, error: Exception) -> None:
        self.failures += 1
        log.error("%s was not exported, and stays as it is: %s", tag, error)
