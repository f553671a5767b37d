# SPDX-License-Identifier: Apache-2.0
"""The queue of exports: which steps, across starts, beside deletion, and after failures. What is written is a stand-in."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from megatron.checkpoint.conversion.export import FOLDER, Export, Exporter
from megatron.checkpoint.steps.step_dirs import EXPORTING, removable


@dataclass
class Fake:
    """Notes what was asked; may wait to be let go, or fail."""

    fails: frozenset[str] = frozenset()
    go: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)
    done: list[str] = field(default_factory=list)
    family: Any = field(default_factory=lambda: SimpleNamespace(hf="Any"))

    def write(self, step: Path, out: Path) -> None:
        self.begun.set()
        self.go.wait(20)
        if step.name in self.fails:
            raise OSError("no space left")
        out.mkdir()
        self.done.append(step.name)


def exporter(place: Path, fake: Fake, every: int = 1) -> Exporter:
    return Exporter(place, cast(Export, fake), every=every)


def publish(work: Exporter, *steps: int) -> None:
    for step in steps:
        folder = work.directory / f"global_step{step}"
        folder.mkdir(exist_ok=True)
        work.published(folder)


def marked(place: Path) -> list[str]:
    return sorted(entry.name for entry in (place / EXPORTING).iterdir())


def test_steps_are_exported_in_order_and_at_their_interval(tmp_path: Path) -> None:
    fake = Fake()
    fake.go.set()
    work = exporter(tmp_path, fake, every=20)
    work.start()
    publish(work, 0, 10, 20, 30, 100)
    assert work.drain() and fake.done == ["global_step0", "global_step20", "global_step100"]
    assert sorted(entry.name for entry in (tmp_path / FOLDER).iterdir()) == ["global_step0", "global_step100", "global_step20"]
    assert marked(tmp_path) == [] and work.failures == 0


def test_training_does_not_wait_and_deletion_does(tmp_path: Path) -> None:
    """A run that is told to stop leaves the rest to its next start."""
    fake = Fake()
    work = exporter(tmp_path, fake)
    work.start()
    publish(work, 1, 2, 3, 4)
    assert fake.begun.wait(20) and fake.done == []
    assert removable(tmp_path, keep=1) == []
    assert not work.drain(hurried=lambda: True) and marked(tmp_path) == [f"global_step{step}" for step in (1, 2, 3, 4)]
    fake.go.set()
    work._thread.join(20)
    assert fake.done == ["global_step1"], "stopped, it begins no further one"
    again = Fake()
    again.go.set()
    (tmp_path / FOLDER / "global_step2.partial").mkdir(parents=True)
    later = exporter(tmp_path, again)
    later.start()
    assert later.drain() and again.done == ["global_step2", "global_step3", "global_step4"]
    assert not (tmp_path / FOLDER / "global_step2.partial").exists()
    assert removable(tmp_path, keep=1) == [1, 2, 3]


def test_a_failure_is_counted_and_keeps_nothing_from_being_deleted(tmp_path: Path) -> None:
    fake = Fake(fails=frozenset({"global_step1"}))
    fake.go.set()
    work = exporter(tmp_path, fake)
    (tmp_path / EXPORTING).mkdir()
    (tmp_path / EXPORTING / "global_step0").touch()  # its folder was deleted by hand
    work.start()
    publish(work, 1, 2)
    assert work.drain() and fake.done == ["global_step2"] and work.failures == 1
    assert marked(tmp_path) == []
    (tmp_path / "blocked").write_text("a file where a folder must be")
    blocked = exporter(tmp_path / "blocked", fake)
    blocked.published(tmp_path / "blocked" / "global_step7")
    assert blocked.failures == 1
