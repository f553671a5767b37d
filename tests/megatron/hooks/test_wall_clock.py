# SPDX-License-Identifier: Apache-2.0
"""When a run stops so that its last checkpoint is in time."""

from __future__ import annotations

import logging

import pytest

from megatron.errors import ConfigError, NoTimeError
from megatron.hooks.stopping import Limits, StopRequest, WallClock, job_end


class Time:
    """A clock set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def wall(time: Time, **limits: float) -> WallClock:
    return WallClock(Limits(**limits), clock=time, now=lambda: 5000.0)


def test_the_stop_leaves_time_for_what_was_measured() -> None:
    time = Time()
    clock = wall(time, killed_at=5600.0, margin_s=60.0)
    assert clock.left_s() == 600.0 and clock.reason() is None
    clock.step_took(10.0)
    clock.save_took(100.0)
    assert clock.needed_s() == pytest.approx(1.5 * 100 + 2 * 10)
    time.now = 1000 + 600 - 60 - 170 - 1
    assert clock.reason() is None
    time.now += 1
    assert clock.reason() == "the job ends in 230 s"
    # A shorter save later does not undo what one may take.
    clock.save_took(1.0)
    assert clock.needed_s() == pytest.approx(170)


def test_a_grace_too_short_is_told_with_both_numbers(caplog: pytest.LogCaptureFixture) -> None:
    clock = wall(Time(), grace_s=30.0)
    logging.getLogger("megatron").propagate = True
    with caplog.at_level(logging.WARNING):
        clock.step_took(1.0)
        clock.save_took(10.0)
        assert not caplog.records
        clock.save_took(40.0)
        clock.save_took(39.0)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "up to 62.0 s" in said and "took 40.0 s" in said and "only 30.0 s" in said and "USR1@125" in said


def test_no_time_for_a_step() -> None:
    with pytest.raises(NoTimeError, match="ends in 50 s") as caught:
        StopRequest(wall=wall(Time(), killed_at=5050.0)).require_time()
    assert caught.value.exit_code == 76
    StopRequest(wall=wall(Time(), killed_at=5061.0)).require_time()
    StopRequest().require_time()


def test_where_the_end_is_read() -> None:
    assert job_end({"SLURM_JOB_END_TIME": "1700000000"}) == 1.7e9 and job_end({}) is None
    with pytest.raises(ConfigError, match="not seconds"):
        job_end({"SLURM_JOB_END_TIME": "tomorrow"})
