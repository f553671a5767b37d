# SPDX-License-Identifier: Apache-2.0
"""A run is told to stop, and killed, while it saves slowly: nothing that was published is lost. (F12)"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from megatron.checkpoint.steps.discovery import Search, find
from megatron.checkpoint.steps.manifest import Verify, look_at
from megatron.checkpoint.steps.step_dirs import recover, saved_steps, step_tag
from support.jobs import Job, settings

pytestmark = pytest.mark.timeout(200)

# In the background, the steps go on while step 4 is written.
SLOW = [{"site": "write", "step": step, "action": "sleep", "value": 0.01, "times": 100_000} for step in (4, 5, 6)]
REQUEUE = 75


def saving_step_4(folder: Path, background: bool) -> Job:
    """A run within its second save."""
    config = settings(folder, train_iters=1000, lr_decay_iters=1000, checkpoint_factor=2, checkpoint_async=background)
    job = Job(folder, config, faults=SLOW)
    deadline = time.monotonic() + 100
    while not (job.save / "global_step4.partial").exists():
        assert job.process.poll() is None and time.monotonic() < deadline, job.output[-3000:]
        time.sleep(0.02)
    return job


@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.full)], ids=["at once", "background"])
def test_a_second_signal_while_it_saves(tmp_path: Path, background: bool) -> None:
    """The save comes to its end, and the run leaves as if it had been told once."""
    job = saving_step_4(tmp_path, background)
    job.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(100) in (0, REQUEUE)
    steps = saved_steps(job.save)
    assert steps[:2] == [2, 4] and all(look_at(job.save / step_tag(step), Verify.FULL).whole for step in steps)
    assert not list(job.save.glob("*.partial"))
    assert steps[-1] == max(job.losses())


@pytest.mark.parametrize("background", [False, True], ids=["at once", "background"])
def test_sigkill_a_second_after_sigterm(tmp_path: Path, background: bool) -> None:
    job = saving_step_4(tmp_path, background)
    job.process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert job.process.poll() is None
    job.process.kill()
    job.wait(20)
    assert find(Search(directory=job.save, own=True)) == step_tag(2)
    assert recover(job.save) and not list(job.save.glob("*.partial"))
    assert look_at(job.save / step_tag(2), Verify.FULL).whole
