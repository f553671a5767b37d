# SPDX-License-Identifier: Apache-2.0
"""A clock set back, and a shared file system that shows other hosts' folders late. (F29)"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.steps import discovery
from megatron.checkpoint.steps.discovery import Search, find, wait_until_seen
from megatron.checkpoint.steps.run_lock import acquire, held
from megatron.checkpoint.steps.step_dirs import prune, saved_steps, write_latest
from megatron.errors import CheckpointError, ConfigError
from support.checkpoints import step_folder
from support.dist import run_distributed


def test_order_is_by_step(tmp_path: Path) -> None:
    """The newest step was written when the clock was an hour behind; 100 also sorts before 99 as text."""
    for number, step in enumerate((98, 99, 100)):
        folder = step_folder(tmp_path, step)
        moment = time.time() - 3600 * number
        for path in (*folder.rglob("*"), folder):
            os.utime(path, (moment, moment))
    write_latest(tmp_path, "global_step100")
    assert find(Search(directory=tmp_path)) == find(Search(directory=tmp_path, own=True)) == "global_step100"
    assert prune(tmp_path, keep=2, protected=()) == [98] and saved_steps(tmp_path) == [99, 100]


def test_a_clock_set_back_makes_no_lock_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ages are told by the file system's clock, and waiting is by one that only goes on."""
    true = time.time()
    with held(tmp_path):
        for now in (true - 7200, true + 7200):
            monkeypatch.setattr(time, "time", lambda now=now: now)
            monkeypatch.setattr("megatron.checkpoint.steps.run_lock._place", lambda: "another host")
            with pytest.raises(ConfigError, match="another run writes"):
                acquire(tmp_path)


def late(monkeypatch: pytest.MonkeyPatch, folder: Path, looks: int) -> list[int]:
    """Have `folder` appear only at the given look; returns the number of looks so far, in a list."""
    true, seen = os.stat, [0]

    def stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if str(path) == str(folder):
            seen[0] += 1
            if seen[0] < looks:
                raise FileNotFoundError(2, "not yet", str(path))
        return true(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    return seen


def test_a_folder_that_appears_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = step_folder(tmp_path, 10)
    monkeypatch.setattr(discovery, "_POLL_S", 0.01)
    seen = late(monkeypatch, folder, looks=6)
    wait_until_seen(folder, within_s=30)
    assert seen == [6]


def test_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = step_folder(tmp_path, 10)
    monkeypatch.setattr(discovery, "_POLL_S", 0.01)
    late(monkeypatch, folder, looks=10**9)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="does not see the checkpoint after 0.2 s") as error:
        wait_until_seen(folder, within_s=0.2)
    assert time.monotonic() - began < 10 and error.value.where == str(folder) and "all hosts share" in str(error.value.fix)


def find_late(rank: int, world: int, directory: str, looks: int, within_s: float) -> str:
    """What `find` gives on two ranks, of which the second sees the newest folder late."""
    import torch.distributed as dist

    from megatron.mpu.groups import Group

    discovery.SEEN_WITHIN_S, discovery._POLL_S = within_s, 0.01
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            late(patch, Path(directory) / "global_step10", looks)
        group = Group(rank=rank, size=world, ranks=tuple(range(world)), handle=dist.group.WORLD)
        try:
            return find(Search(directory=Path(directory), own=True), group)
        except CheckpointError as error:
            return str(error)


@pytest.mark.dist
@pytest.mark.timeout(200)
def test_the_ranks_agree_on_a_folder_that_one_sees_late(tmp_path: Path) -> None:
    """Neither does the late one miss files, nor does the other go on alone."""
    step_folder(tmp_path, 10)
    told = run_distributed(find_late, world=2, timeout_s=90, directory=str(tmp_path), looks=10, within_s=30.0)
    assert told == ["global_step10"] * 2
    first, second = run_distributed(find_late, world=2, timeout_s=90, directory=str(tmp_path), looks=10**9, within_s=0.2)
    assert first == second and "rank 1 on" in first and "does not see the checkpoint after 0.2 s" in first
    assert saved_steps(tmp_path) == [10]  # what is late is not damaged
