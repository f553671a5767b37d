# SPDX-License-Identifier: Apache-2.0
"""A folder gets its name in one piece, and what a killed run left is cleared up."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron import fault_injection
from megatron.checkpoint.steps.commit import publish, recover
from megatron.checkpoint.steps.manifest import problems_of, read_manifest
from megatron.errors import TrainingError
from support.checkpoints import flip, step_folder


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
