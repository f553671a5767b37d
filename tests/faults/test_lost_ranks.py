# SPDX-License-Identifier: Apache-2.0
"""A rank raises, leaves without a word, or crashes: the run ends, and its report begins with that rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.jobs import Job, settings

pytestmark = [pytest.mark.dist, pytest.mark.timeout(110)]


@pytest.mark.parametrize(
    ("fault", "status", "told"),
    [
        ({"action": "raise", "value": "out of luck"}, 1, "RuntimeError: out of luck"),
        pytest.param({"action": "exit", "value": 7}, 7, "exit status 7", marks=pytest.mark.full),
        ({"action": "segfault"}, 139, "SIGSEGV"),
        pytest.param({"action": "kill"}, 137, "SIGKILL", marks=pytest.mark.full),
    ],
    ids=["raise", "exit", "segfault", "kill"],
)
def test_the_rank_that_failed_first_is_told_first(tmp_path: Path, fault: dict[str, Any], status: int, told: str) -> None:
    job = Job(tmp_path, settings(tmp_path, 2, train_iters=8), faults=[{"site": "step", "rank": 1, "step": 3, **fault}])
    assert job.wait(100) == status
    report = job.output[job.output.index("failed first:") :]
    assert "rank 1 on" in job.output[: job.output.index("failed first:")].splitlines()[-1]
    assert told in report
    if fault["action"] == "raise":
        # The line that raised, in the rank's own traceback.
        assert "fault_injection.point" in report and "training.py" in report
    assert not job.pids()
    assert sorted(job.losses()) == [1, 2]
