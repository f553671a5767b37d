# SPDX-License-Identifier: Apache-2.0
"""How far the writing of a dataset is: a bar on a terminal, else a line now and then. Knows no files."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from megatron.data.preprocess.resumable_output import Counts
from megatron.log import get_logger

log = get_logger(__name__)

LINE_EVERY_S = 10.0


class EncodingProgress:
    """A context; `update` costs next to nothing.

    total_bytes: of the input, None where not known; start: what an earlier run had done
    log_interval: documents between two lines at least; num_docs: documents expected
    """

    def __init__(self, total_bytes: int | None, start: Counts, log_interval: int, num_docs: int | None) -> None:
        self.total_bytes, self.num_docs, self.log_interval = total_bytes, num_docs, log_interval
        self._documents = self._said_documents = start.documents
        self._bytes = start.source_bytes
        self._started = self._said = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_bytes, initial=self._bytes, unit="B", unit_scale=True, mininterval=0.5)

    def __enter__(self) -> EncodingProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, counts: Counts) -> None:
        """Show how far it is, if it is time."""
        now = time.monotonic()
        if self._bar is not None:
            if now - self._said > 0.5:
                self._said = now
                self._bar.set_postfix_str(f"{counts.documents} docs, {self._rate(counts, now):.0f} docs/s", refresh=False)
                self._bar.update(counts.source_bytes - self._bar.n)
            return
        if now - self._said > LINE_EVERY_S and counts.documents - self._said_documents >= self.log_interval:
            self._said, self._said_documents = now, counts.documents
            log.info("%s", self.line(counts, now))

    def line(self, counts: Counts, now: float) -> str:
        """Documents, speed and what is left, in one line."""
        seconds = max(now - self._started, 1e-9)
        parts = [f"{counts.documents} documents", f"{self._rate(counts, now):.1f} docs/s"]
        speed = (counts.source_bytes - self._bytes) / seconds
        if speed > 0:
            parts.append(f"{speed / 1e6:.2f} MB/s")
        if self.total_bytes and speed > 0:
            left = max(self.total_bytes - counts.source_bytes, 0) / speed
            parts.append(f"{100 * counts.source_bytes / self.total_bytes:.1f} %, {left:.0f} s left")
        elif self.num_docs and counts.documents > self._documents:
            left = max(self.num_docs - counts.documents, 0) / self._rate(counts, now)
            parts.append(f"{100 * counts.documents / self.num_docs:.1f} %, {left:.0f} s left")
        return ", ".join(parts)

    def _rate(self, counts: Counts, now: float) -> float:
        return (counts.documents - self._documents) / max(now - self._started, 1e-9)
