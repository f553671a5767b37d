# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint is taken, and what is said about it."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from megatron.checkpoint.steps.discovery import Search, find, nothing_saved, set_aside_after
from megatron.checkpoint.steps.manifest import Verify
from megatron.checkpoint.steps.step_dirs import latest_tag, saved_steps, write_latest
from megatron.errors import CheckpointError
from support.checkpoints import KINDS, flip, step_folder
from support.dist import run_distributed


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (5, 9, 10):
        step_folder(tmp_path, step)
    write_latest(tmp_path, "global_step10")
    return tmp_path


def test_latest_is_a_hint(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert find(Search(directory=run)) == "global_step10" and not caplog.text
    write_latest(run, "global_step9")
    assert find(Search(directory=run)) == "global_step10" and "`iteration: 9`" in caplog.text
    (run / "latest").unlink()
    caplog.clear()
    assert find(Search(directory=run)) == "global_step10" and not caplog.text
    write_latest(run, "global_step11")
    assert find(Search(directory=run)) == "global_step10" and "global_step11, which is not there" in caplog.text
    assert find(Search(directory=run, iteration=5, own=False)) == "global_step5" and saved_steps(run) == [5, 9, 10]


def test_folders_without_a_manifest_need_somebodys_word(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    step_folder(run, 20, manifest=False)
    assert find(Search(directory=run)) == "global_step10"
    caplog.clear()
    write_latest(run, "global_step20")
    assert find(Search(directory=run)) == "global_step20"
    # Beside folders with manifests, it is a warning.
    assert [record.levelno for record in caplog.records] == [logging.WARNING] and "cannot be verified" in caplog.text
    for step in (5, 9, 10):
        (run / f"global_step{step}" / "MANIFEST.json").unlink()
    with caplog.at_level(logging.INFO):
        caplog.clear()
        assert find(Search(directory=run)) == "global_step20" == find(Search(directory=run, iteration=20))
        assert [record.levelno for record in caplog.records] == [logging.INFO] * 2 and "cannot be verified" in caplog.text
    (run / "global_step5").rename(run / "release")
    write_latest(run, "release")
    assert find(Search(directory=run)) == "release"


def test_going_back_sets_later_steps_aside(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert find(Search(directory=run, iteration=5, own=True)) == "global_step5"
    assert saved_steps(run) == [5] and latest_tag(run) == "global_step5"
    assert (run / "global_step9.abandoned").is_dir() and (run / "global_step10.abandoned" / KINDS["weights"]).exists()
    assert "global_step10.abandoned" in caplog.text and "remove `iteration: 5`" in caplog.text
    step_folder(run, 10)
    assert set_aside_after(run, 5) == [10] and (run / "global_step10.abandoned-2").is_dir()
    assert set_aside_after(run, 5) == [] and find(Search(directory=run, own=True)) == "global_step5"


def test_verification_can_be_lowered(run: Path) -> None:
    flip(run / "global_step10" / KINDS["weights"])
    with pytest.raises(CheckpointError, match="content differs"):
        find(Search(directory=run))
    assert find(Search(directory=run, verify=Verify.SIZE)) == "global_step10"
    (run / "global_step10" / KINDS["weights"]).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        find(Search(directory=run, verify=Verify.SIZE))
    assert find(Search(directory=run, verify=Verify.OFF)) == "global_step10"


def test_what_is_missing_is_said(tmp_path: Path, run: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint of iteration 6; steps there: 5, 9, 10"):
        find(Search(directory=run, iteration=6))
    for step in (5, 9, 10):
        shutil.rmtree(run / f"global_step{step}")
    with pytest.raises(CheckpointError, match="global_step10, which is not there"):
        find(Search(directory=run, own=True))
    (run / "latest").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        find(Search(directory=run))
    assert nothing_saved(run) and nothing_saved(run / "nowhere")
    (run / "global_step7.corrupt").mkdir()
    assert not nothing_saved(run)


def find_on(rank: int, world: int, directory: str, own: bool) -> str:
    """What `find` gives on one of several ranks."""
    import os

    from megatron.mpu.groups import Group

    group = Group(rank=rank, size=world, ranks=tuple(range(world)), handle=_world())
    os.environ["RANK"] = str(rank)
    try:
        return find(Search(directory=Path(directory), own=own), group)
    except CheckpointError as error:
        return str(error)


def _world() -> object:
    import torch.distributed as dist

    return dist.group.WORLD


@pytest.mark.dist
@pytest.mark.timeout(100)
def test_ranks_share_the_work_and_agree(run: Path) -> None:
    for name in ("weights", "optimizer", "configs"):
        flip(run / "global_step10" / KINDS[name])
    first, second = run_distributed(find_on, world=2, timeout_s=80, directory=str(run), own=False)
    assert first == second and all(KINDS[name] in first for name in ("weights", "optimizer", "configs")) and "`iteration: 9`" in first
    assert run_distributed(find_on, world=2, timeout_s=80, directory=str(run), own=True) == ["global_step9"] * 2
    assert saved_steps(run) == [5, 9] and (run / "global_step10.corrupt").is_dir()
