# SPDX-License-Identifier: Apache-2.0
"""Marked checkpoints are worked off beside the caller; what is left when time is up stays marked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.checkpoint.steps import upload
from megatron.checkpoint.steps.upload import PublishedQueue


class Queue(PublishedQueue):
    """Whose work, a function of the name, takes away the marker itself."""

    def __init__(self, directory: Path, work: Callable[[str], object]) -> None:
        super().__init__(directory, ".marks", waiting="%s", undone="done: %s", failed="%s: %s")
        self.work = work
        self.reports = 0

    def _attempt(self, tag: str) -> None:
        self.work(tag)

    def _report(self) -> None:
        self.reports += 1


def test_marks_of_before_and_new_ones_are_worked_off(tmp_path: Path) -> None:
    marks, done = tmp_path / ".marks", list[str]()
    marks.mkdir()
    (marks / "global_step1").touch()

    def attempt(name: str) -> None:
        done.append(name)
        if name != "global_step2" or done.count(name) == 2:
            (marks / name).unlink()

    queue = Queue(tmp_path, attempt)
    queue.start()
    assert queue._idle.wait(10) and done == ["global_step1"]
    for name in ("global_step2", "global_step3"):
        queue.published(tmp_path / name)
        assert queue._idle.wait(10)
    assert queue.drain() and sorted(done) == ["global_step1", "global_step2", "global_step2", "global_step3"]
    queue._thread.join(10)
    assert not queue._thread.is_alive()


def test_what_does_not_move_is_given_up_and_stays_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "PROGRESS_S", 0.1)
    gate = threading.Event()
    queue = Queue(tmp_path, lambda name: gate.wait(20))
    queue.start()
    queue.published(tmp_path / "global_step1")
    assert not queue.drain(patience_s=0.5)
    assert queue.reports and queue.marked() == ["global_step1"]
    gate.set()
    queue._thread.join(10)
    assert not queue._thread.is_alive()
