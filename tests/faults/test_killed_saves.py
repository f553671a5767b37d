# SPDX-License-Identifier: Apache-2.0
"""A run is killed while it saves: what is found next is the last checkpoint that was whole, and nothing half done stays. (F1, F2)"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from megatron.checkpoint.steps.discovery import Search, find
from megatron.checkpoint.steps.manifest import Verify, look_at, read_manifest
from megatron.checkpoint.steps.step_dirs import latest_tag, recover, step_of, step_tag
from support.jobs import Job, settings
from support.saves import FILES, Server, server

PIECE_S = 0.002


def kill_at(saves: Server, pid: int, steps: int, after_s: float) -> int:
    """Let `steps` saves come to their end, and SIGKILL the saver `after_s` into the next; returns the last step it said was saved."""
    saved = -1
    while True:
        word, step, *_ = saves.heard().split()
        if word == "saved":
            saved, steps = int(step), steps - 1
        elif steps == 0:
            break
    time.sleep(after_s)
    os.kill(pid, signal.SIGKILL)
    return max([saved, *[int(line.split()[1]) for line in saves.end() if line.startswith("saved")]])


def duration(saves: Server, folder: Path, background: bool) -> float:
    """Seconds of one slow save."""
    pid = saves.begin(folder, 1, piece_s=PIECE_S, background=background)
    while (line := saves.heard().split())[0] != "saved":
        pass
    os.kill(pid, signal.SIGKILL)
    saves.end()
    return float(line[2])


def orphans(folder: Path) -> list[str]:
    """What belongs to no checkpoint."""
    return [entry.name for entry in folder.iterdir() if entry.name != "latest" and step_of(entry.name) is None]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kills", "background"),
    [(12, False), pytest.param(50, False, marks=pytest.mark.full), pytest.param(50, True, marks=pytest.mark.full)],
    ids=["12", "50", "50 in the background"],
)
def test_sigkill_at_any_moment_of_a_save(tmp_path: Path, kills: int, background: bool) -> None:
    chance, folder, unfinished = random.Random(7), tmp_path / "run", 0
    with server() as saves:
        whole_s = duration(saves, tmp_path / "measured", background)
        assert whole_s > 20 * PIECE_S
        newest = 0
        for _ in range(kills):
            pid = saves.begin(folder, newest + 1, piece_s=PIECE_S, background=background)
            # The first save of the folder must come to its end, or there is nothing to find.
            saved = max(newest, kill_at(saves, pid, 1 if newest == 0 else 0, chance.uniform(0, 1.1 * whole_s)))
            tag = find(Search(directory=folder, own=True, verify=Verify.FULL))
            assert step_of(tag) in (saved, saved + 1), "neither the last that was saved nor the one that was being published"
            newest = int(tag.removeprefix("global_step"))
            unfinished += bool(orphans(folder))
            recover(folder)
            assert orphans(folder) == []
            assert find(Search(directory=folder, own=True, verify=Verify.FULL)) == tag
            manifest = read_manifest(folder / tag)
            assert manifest is not None and {*FILES, "configs/a.yml"} == set(manifest.files)
    assert unfinished > kills // 3, "the kills did not meet the saves"


@pytest.mark.timeout(200)
@pytest.mark.parametrize("kills", [6, pytest.param(30, marks=pytest.mark.full)])
def test_sigkill_while_a_step_is_saved_again(tmp_path: Path, kills: int) -> None:
    """The one of that name is there all the time: the old one, or the new one, and whole."""
    chance, folder = random.Random(3), tmp_path / "run"
    with server() as saves:
        whole_s = duration(saves, tmp_path / "measured", False)
        pid = saves.begin(folder, 5, between=0)
        kill_at(saves, pid, 1, 0.0)
        for _ in range(kills):
            pid = saves.begin(folder, 5, between=0, piece_s=PIECE_S)
            kill_at(saves, pid, 0, chance.uniform(0.3, 1.1) * whole_s)
            recover(folder)
            assert look_at(folder / step_tag(5), Verify.FULL).whole and orphans(folder) == []
            assert find(Search(directory=folder, own=True)) == step_tag(5)


@pytest.mark.timeout(150)
def test_a_killed_run_goes_on_from_the_last_whole_checkpoint(tmp_path: Path) -> None:
    """A whole run: killed within the second save, it resumes from the first, and clears up."""
    config = settings(tmp_path, train_iters=6, checkpoint_factor=2)
    job = Job(tmp_path, config, faults=[{"site": "write", "step": 4, "skip": 40, "action": "kill"}])
    assert job.wait(100) == -signal.SIGKILL
    assert "global_step4.partial" in orphans(job.save) and latest_tag(job.save) == "global_step2"
    again = Job(tmp_path, config)
    assert again.wait(100) == 0
    assert "starting from iteration 2" in again.output and "removed global_step4.partial" in again.output
    assert latest_tag(job.save) == "global_step6" and look_at(job.save / "global_step4", Verify.FULL).whole
    assert not [name for name in orphans(job.save) if name.startswith("global_step")]
