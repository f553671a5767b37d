# SPDX-License-Identifier: Apache-2.0
"""A disk that fails one rank, writers that raise, and runs that end while a checkpoint is being written. (F5, F6)"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.checkpoint.build import own_folder
from megatron.checkpoint.steps.manifest import Verify, look_at
from megatron.checkpoint.steps.step_dirs import latest_tag, saved_steps, step_tag
from megatron.errors import ConfigError
from megatron.mpu.groups import Group
from support.jobs import Job, settings

pytestmark = [pytest.mark.dist, pytest.mark.timeout(200)]


def whole(folder: Path) -> list[int]:
    """The steps that are there; each must be whole, and nothing half done beside them."""
    steps = saved_steps(folder)
    assert all(look_at(folder / step_tag(step), Verify.FULL).whole for step in steps)
    assert not [entry.name for entry in folder.glob("global_step*.*")]
    return steps


def failures(job: Job) -> dict[int, float]:
    """{iteration: checkpoint_failures} of the rows that have it."""
    return {int(row["iteration"]): row["checkpoint_failures"] for row in job.rows() if "checkpoint_failures" in row}


def full(step: int, **row: Any) -> dict[str, Any]:
    """Rank 1's disk is full while this step is saved."""
    return {"site": "write", "rank": 1, "step": step, "action": "disk", **row}


def test_a_full_disk_on_one_rank(tmp_path: Path) -> None:
    """Training goes on with an alarm; the last save tells the truth."""
    config = settings(tmp_path, 2, train_iters=6, checkpoint_factor=2, zero_optimization={"stage": 1})
    job = Job(tmp_path, config, faults=[full(2), full(6, times=100_000)], launched=False)
    assert job.wait(150) == 1
    assert "rank 1: zero_pp_rank_1_mp_rank_00_optim_states.pt: No space left on device" in job.output
    assert "the checkpoint of step 6 was not saved:" in job.output
    assert sorted(job.losses()) == [1, 2, 3, 4, 5, 6] and whole(job.save) == [4] and latest_tag(job.save) == step_tag(4)
    assert failures(job) == {3: 1.0, 4: 1.0, 5: 1.0, 6: 1.0}


@pytest.mark.full
def test_too_many_failures_in_a_row(tmp_path: Path) -> None:
    config = settings(tmp_path, 2, train_iters=20, checkpoint_factor=2, checkpoint_failures_allowed=1, zero_optimization={"stage": 1})
    job = Job(tmp_path, config, faults=[full(4, times=100_000), full(6, times=100_000)], launched=False)
    assert job.wait(150) == 1
    assert "step 6 was not saved (2 in a row; checkpoint_failures_allowed: 1)" in job.output
    assert max(job.losses()) == 6 and whole(job.save) == [2]


def test_a_folder_that_cannot_be_written_to_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    args: Any = SimpleNamespace(checkpoint=SimpleNamespace(save=str(tmp_path / "file" / "run")))
    with pytest.raises(ConfigError, match="cannot be written to"), own_folder(args, Group.single()):
        pass


def test_a_writer_that_raises_and_a_rank_that_is_slow(tmp_path: Path) -> None:
    """In the background: told at a later step, one under way at a time, and the end waits for the last."""
    faults = [
        {"site": "write", "rank": 1, "step": 2, "action": "raise", "value": "made to fail"},
        *[{"site": "write", "rank": 1, "step": step, "action": "sleep", "value": 0.05, "times": 60} for step in (4, 5, 6)],
    ]
    config = settings(tmp_path, 2, train_iters=7, checkpoint_factor=2, checkpoint_async=True, zero_optimization={"stage": 1})
    job = Job(tmp_path, config, faults=faults, launched=False)
    assert job.wait(150) == 0
    told = job.output.index("rank 1: zero_pp_rank_1_mp_rank_00_optim_states.pt: made to fail")
    assert told < job.output.index("successfully saved checkpoint at iteration       4")
    assert "for the checkpoint of step 4, before the next" in job.output
    assert whole(job.save) == [4, 6, 7] and latest_tag(job.save) == step_tag(7)
    assert set(failures(job).values()) == {1.0}


@pytest.mark.full
def test_a_run_that_fails_while_it_saves_in_the_background(tmp_path: Path) -> None:
    """Several ranks discard what is under way; the next start goes on from the one before."""
    config = settings(tmp_path, 2, train_iters=6, checkpoint_factor=2, checkpoint_async=True, zero_optimization={"stage": 1})
    slow = [{"site": "write", "step": step, "action": "sleep", "value": 0.05, "times": 100_000} for step in (4, 5)]
    job = Job(tmp_path, config, faults=[*slow, {"site": "step", "step": 5, "action": "raise"}], launched=False)
    assert job.wait(150) != 0
    assert saved_steps(job.save) == [2]
    again = Job(tmp_path, config, launched=False)
    assert again.wait(150) == 0
    assert "starting from iteration 2" in again.output and whole(job.save) == [2, 4, 6]
