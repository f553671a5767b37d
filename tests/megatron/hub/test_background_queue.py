# SPDX-License-Identifier: Apache-2.0
"""Marked items are worked off beside the caller; what is left when time is up stays marked."""

from __future__ import annotations

import threading
from pathlib import Path

from megatron.hub.background_queue import BackgroundQueue


def test_marks_of_before_and_new_ones_are_worked_off(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    done: list[str] = []

    def attempt(name: str) -> None:
        done.append(name)
        if name != "broken" or done.count(name) == 2:
            (tmp_path / name).unlink()

    queue = BackgroundQueue("work", lambda: sorted(path.name for path in tmp_path.iterdir()), attempt)
    queue.start()
    assert queue.wait_idle(10) and done == ["a"]
    for name in ("broken", "b"):
        (tmp_path / name).touch()
        queue.wake()
        assert queue.wait_idle(10)
    assert queue.drain() and sorted(done) == ["a", "b", "broken", "broken"] and queue.join(10)


def test_what_does_not_move_is_given_up_and_stays_marked(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    gate, reports = threading.Event(), list[int]()
    queue = BackgroundQueue("work", lambda: [path.name for path in tmp_path.iterdir()], lambda name: gate.wait(20) and None)
    queue.start()
    assert queue.busy and not queue.drain(patience_s=0.5, report=lambda: reports.append(1), report_s=0.1)
    assert reports and (tmp_path / "a").exists()
    gate.set()
    assert queue.join(10)
