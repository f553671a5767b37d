# SPDX-License-Identifier: Apache-2.0
"""A folder gets its name in one piece, what a killed run left is cleared up, and old steps go while the last whole ones stay."""

from __future__ import annotations

import doctest
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron import fault_injection
from megatron.checkpoint.steps import step_dirs
from megatron.checkpoint.steps.manifest import problems_of, read_manifest
from megatron.checkpoint.steps.step_dirs import UPLOADING, outdated, prune, publish, recover, removable, saved_steps
from megatron.errors import TrainingError
from support.checkpoints import KINDS, flip, step_folder


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def aside(directory: Path, step: int) -> Path:
    """A finished folder under the name it has before it is published; its content is that of a later attempt."""
    made = step_folder(directory / "made", step)
    (made / "extra").write_text("second attempt")
    return made.rename(directory / f"global_step{step}.partial")


def test_a_second_attempt_replaces_the_first_whole(tmp_path: Path) -> None:
    publish(aside(tmp_path, 5), tmp_path / "global_step5")
    (tmp_path / "made").rmdir()
    assert names(tmp_path) == {"global_step5"}
    with pytest.raises(TrainingError, match="was not written"):
        publish(tmp_path / "global_step5.partial", tmp_path / "global_step5")
    assert names(tmp_path) == {"global_step5"}
    publish(aside(tmp_path, 5), tmp_path / "global_step5")
    (tmp_path / "made").rmdir()
    assert names(tmp_path) == {"global_step5"} and recover(tmp_path) == []


def test_a_run_killed_between_the_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = step_folder(tmp_path, 5), aside(tmp_path, 5)

    def killed(site: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fault_injection, "point", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(second, first)
    assert not first.exists()
    lines = recover(tmp_path)
    (tmp_path / "made").rmdir()
    assert names(tmp_path) == {"global_step5"} and not (first / "extra").exists()
    manifest = read_manifest(first)
    assert manifest is not None and problems_of(first, manifest, digests=True) == []
    assert len(lines) == 2 and "as it was before" in " ".join(lines)


def test_leftovers_go_and_nothing_else(tmp_path: Path) -> None:
    step_folder(tmp_path, 10)
    kept = ["global_step10.corrupt", "global_step20.abandoned-2", "mine.partial", "metrics.jsonl", "latest"]
    left = ["global_step30.partial", "global_step30.partial.ab12", "global_step1.deleted.77", "global_step10.old.1f", "latest.tmp.9"]
    for name in (*kept, *left):
        if name.startswith(("latest", "metrics")):
            (tmp_path / name).write_text("x")
        else:
            shutil.copytree(tmp_path / "global_step10", tmp_path / name)
    lines = recover(tmp_path)
    assert names(tmp_path) == {"global_step10", *kept}
    assert len(lines) == len(left) and all(any(name in line for line in lines) for name in left)
    assert recover(tmp_path) == recover(tmp_path / "nowhere") == []


def test_a_damaged_old_one_is_not_put_back(tmp_path: Path) -> None:
    old = step_folder(tmp_path, 10).rename(tmp_path / "global_step10.old.1f")
    (old / "mp_rank_00_model_states.pt").unlink()
    other = step_folder(tmp_path, 20).rename(tmp_path / "global_step20.old.1f")
    flip(other / "MANIFEST.json")
    older = step_folder(tmp_path, 30, manifest=False).rename(tmp_path / "global_step30.old.1f")
    recover(tmp_path)
    assert names(tmp_path) == {"global_step30"} and not older.exists()


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
    assert doctest.testmod(step_dirs).failed == 0
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


def test_the_damaged_do_not_count(tmp_path: Path) -> None:
    """By names and sizes: a step that its manifest contradicts is none of those kept, and goes when it is older than them."""
    for step in (10, 20, 30, 40, 50):
        step_folder(tmp_path, step)
    (tmp_path / "global_step50" / KINDS["weights"]).unlink()
    (tmp_path / "global_step30" / KINDS["weights"]).write_bytes(b"half")
    flip(tmp_path / "global_step20" / "MANIFEST.json")
    assert removable(tmp_path, keep=2, protected=()) == []  # 40 and 10 stay; 20 and 30 are not older than both
    assert prune(tmp_path, keep=1, protected={20}) == [10, 30]
    assert saved_steps(tmp_path) == [20, 40, 50]
    (tmp_path / "global_step40" / "MANIFEST.json").write_text("")
    assert removable(tmp_path, keep=1, protected=()) == []  # nothing whole is left


def test_the_newest_verified_stays(tmp_path: Path) -> None:
    """Folders without a manifest count among the newest, but do not push it out."""
    for step in (10, 20):
        step_folder(tmp_path, step)
    for step in (30, 40, 50):
        step_folder(tmp_path, step, manifest=False)
    assert prune(tmp_path, keep=1, protected=()) == [10, 30, 40]
    assert saved_steps(tmp_path) == [20, 50]


def test_multiples_and_uploads_stay(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        step_folder(tmp_path, step)
    (tmp_path / UPLOADING).mkdir()
    (tmp_path / UPLOADING / "global_step30").touch()
    assert prune(tmp_path, keep=1, protected=(), every=20) == [10]
    (tmp_path / UPLOADING / "global_step30").unlink()
    assert prune(tmp_path, keep=1, protected=(), every=20) == [30]
    assert saved_steps(tmp_path) == [20, 40, 50]


def test_a_deletion_cut_short_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20):
        step_folder(tmp_path, step)

    def killed(path: Path, **how: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, keep=1, protected=())
    monkeypatch.undo()
    assert saved_steps(tmp_path) == [20] and len(recover(tmp_path)) == 1
    assert {entry.name for entry in tmp_path.iterdir()} == {"global_step20"}
