# SPDX-License-Identifier: Apache-2.0
"""The line of progress says documents, speed and what is left."""

from __future__ import annotations

import logging

import pytest

from megatron.data.preprocess import writer as room
from megatron.data.preprocess.resumable_output import Counts
from megatron.data.preprocess.writer import EncodingProgress


def test_speed_counts_from_where_the_run_was_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.time, "monotonic", lambda: 100.0)
    progress = EncodingProgress(10_000_000, Counts(documents=500, source_bytes=4_000_000), 100, None)
    line = progress.line(Counts(documents=800, source_bytes=7_000_000), 103.0)
    assert line == "800 documents, 100.0 docs/s, 1.00 MB/s, 70.0 %, 3 s left"
    counted = EncodingProgress(None, Counts(), 100, 1000)
    assert counted.line(Counts(documents=250), 105.0) == "250 documents, 50.0 docs/s, 25.0 %, 15 s left"


def test_lines_come_at_intervals(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    logging.getLogger("megatron").propagate = True
    with caplog.at_level(logging.INFO, logger="megatron"), EncodingProgress(None, Counts(), 100, None) as progress:
        for step in range(60):
            now[0] = step * 1.0
            progress.update(Counts(documents=step * 6))
    said = [record.message.split(",")[0] for record in caplog.records]
    assert said == ["102 documents", "204 documents", "306 documents"], "ten seconds and a hundred documents apart at least"
