# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints are deleted."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.checkpoint import retention
from megatron.checkpoint.neox_store import saved_steps
from megatron.checkpoint.retention import outdated, prune


def folder(path: Path, *steps: int) -> Path:
    for step in steps:
        (path / f"global_step{step}" / "configs").mkdir(parents=True)
        (path / f"global_step{step}" / "mp_rank_00_model_states.pt").write_text("weights")
    return path


@given(st.sets(st.integers(0, 50), min_size=1), st.integers(1, 6), st.sets(st.integers(0, 50)))
def test_the_newest_and_the_protected_stay(steps: set[int], keep: int, protected: set[int]) -> None:
    gone = set(outdated(steps, keep=keep, protected=protected))
    left = steps - gone
    assert max(steps) in left and (steps & protected) <= left and len(left) >= min(keep, len(steps))
    assert len(left - protected) <= keep and outdated(left, keep=keep, protected=protected) == []


def test_folders_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also below a path with a slash at its end; other files, links and leftovers of saves are nobody's checkpoints."""
    assert doctest.testmod(retention).failed == 0
    folder(tmp_path, 0, 5, 10, 15, 20)
    folder(tmp_path / "elsewhere", 1)
    (tmp_path / "global_step1").symlink_to(tmp_path / "elsewhere" / "global_step1")
    (tmp_path / "global_step3.partial").mkdir()
    (tmp_path / "latest").write_text("global_step20")
    assert prune(Path(f"{tmp_path}/"), keep=2, protected={0, 10}) == [5]
    assert saved_steps(tmp_path) == [0, 1, 10, 15, 20]
    assert {entry.name for entry in tmp_path.iterdir()} - {f"global_step{step}" for step in (0, 1, 10, 15, 20)} == {
        "latest", "elsewhere", "global_step3.partial",
    }  # fmt: skip
    assert (tmp_path / "elsewhere/global_step1/mp_rank_00_model_states.pt").exists()

    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "rename", refuse)
    assert prune(tmp_path, keep=1, protected=()) == []  # a warning, not an end of the run
    assert saved_steps(tmp_path) == [0, 1, 10, 15, 20]
