# SPDX-License-Identifier: Apache-2.0
"""A rank hangs, or is stopped: within the limit the run ends, and its report begins with that rank."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from support.jobs import Job, settings

pytestmark = [pytest.mark.dist, pytest.mark.timeout(200)]

LIMIT_S = 3.0
# What comes on top of the limit: looks, comparing notes, and the launcher's patience with ranks that do not react to SIGTERM.
SLACK_S = 30.0
WATCHED = {"heartbeat_interval_in_secs": 0.3, "hang_timeout_in_mins": LIMIT_S / 60, "train_iters": 1000}


def report_of(job: Job) -> tuple[str, str]:
    """The line that names the first rank, and what follows it."""
    before, _, after = job.output.partition("failed first:")
    assert after, job.output[-4000:]
    return before.splitlines()[-1], after


@pytest.mark.parametrize(
    "layout",
    [
        {},
        pytest.param({"pipe_parallel_size": 2}, marks=pytest.mark.full),
        pytest.param({"zero_optimization": {"stage": 2}}, marks=pytest.mark.full),
        pytest.param({"model_parallel_size": 2}, marks=pytest.mark.full),
    ],
    ids=["data", "pipeline", "zero2", "tensor"],
)
def test_a_rank_that_hangs_is_named_with_its_stack(tmp_path: Path, layout: dict[str, Any]) -> None:
    fault = {"site": "step", "rank": 1, "step": 3, "action": "sleep", "value": 600}
    job = Job(tmp_path, settings(tmp_path, 2, **{**WATCHED, **layout}), faults=[fault])
    job.until(lambda text: "iteration        2/" in text)
    began = time.monotonic()
    assert job.wait(150) == 1
    assert time.monotonic() - began < LIMIT_S + SLACK_S
    first, told = report_of(job)
    assert "rank 1 on" in first
    assert "stuck: rank 1 on" in told and "step 3, phase step" in told
    assert "time.sleep" in told and "fault_injection.point" in told  # the line that hangs, and who called it
    assert "then rank 0 on" in told and "waits for" in told
    assert not job.pids()


@pytest.mark.full
def test_a_rank_that_is_stopped_is_named_by_the_others(tmp_path: Path) -> None:
    job = Job(tmp_path, settings(tmp_path, 2, **WATCHED))
    job.until(lambda text: "iteration        2/" in text)
    began = time.monotonic()
    job.signal_rank(1, signal.SIGSTOP)
    assert job.wait(150) == 1
    assert time.monotonic() - began < LIMIT_S + SLACK_S
    first, told = report_of(job)
    assert "rank 1 on" in first
    assert "stuck: rank 1 on" in told and "has not been heard of" in told and "phase step" in told
    assert "rank 0 on" in told and "waits for" in told
    assert not job.pids()


@pytest.mark.full
def test_a_rank_alone_and_no_folder_at_all(tmp_path: Path) -> None:
    fault = {"site": "step", "step": 3, "action": "sleep", "value": 600}
    for place in ({}, {"save": None, "load": None, "checkpoint_factor": None}):
        folder = tmp_path / f"run{len(place)}"
        config = {**settings(folder, 1, **WATCHED), **place}
        job = Job(folder, {**config, "save": config["save"] or None}, faults=[fault])
        assert job.wait(100) == 1
        assert "stuck: rank 0 on" in job.output and "time.sleep" in job.output


@pytest.mark.full
def test_what_is_slow_is_not_stuck(tmp_path: Path) -> None:
    """A step of three quarters of the limit, again and again, and heartbeats that tell of it."""
    fault = {"site": "step", "rank": 1, "action": "sleep", "value": 0.75 * LIMIT_S, "times": 4}
    config = settings(tmp_path, 2, **{**WATCHED, "train_iters": 5, "eval_iters": 2})
    job = Job(tmp_path, config, faults=[fault])
    job.until(lambda text: "iteration        1/" in text)
    record = json.loads((tmp_path / "run" / "heartbeat" / "rank_1.json").read_text())
    assert record["step"] in (1, 2) and record["phase"] in ("step", "save", "evaluate") and record["moves"] > 0
    assert job.wait(150) == 0
    for rank in (0, 1):
        assert json.loads((tmp_path / "run" / "heartbeat" / f"rank_{rank}.json").read_text())["phase"] == "ended"
