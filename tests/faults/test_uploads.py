# SPDX-License-Identifier: Apache-2.0
"""A run whose checkpoints go to S3 is killed in an upload: training was not held up, and the next start brings everything there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.jobs import Job, settings
from support.s3 import BUCKET, Store, s3_server

pytestmark = [pytest.mark.dist, pytest.mark.timeout(200)]


@pytest.fixture
def store() -> Iterator[Store]:
    with s3_server() as found:
        yield found


def copies(save: Path, *steps: int) -> dict[str, bytes]:
    """What must be in the bucket, by name."""
    files = [path for step in steps for path in (save / f"global_step{step}").rglob("*") if path.is_file()]
    return {f"runs/run/{path.relative_to(save)}": path.read_bytes() for path in (*files, save / "latest")}


def test_killed_in_an_upload(store: Store, tmp_path: Path) -> None:
    config = settings(tmp_path, train_iters=4, checkpoint_factor=2, s3_path=f"s3://{BUCKET}/runs")
    slow = [{"site": "upload", "action": "sleep", "value": 4}, {"site": "upload", "skip": 1, "action": "kill"}]
    first = Job(tmp_path, config, faults=slow, env=store.env)
    assert first.wait(100) == -9, first.output
    waiting = sorted(path.name for path in (first.save / ".uploading").iterdir())
    assert waiting == ["global_step2", "global_step4"]
    assert sorted(first.losses()) == [1, 2, 3, 4]
    assert not any("MANIFEST" in name for name in store.objects())
    second = Job(tmp_path, config | {"train_iters": 6, "keep_last_n_checkpoints": 1}, env=store.env)
    assert second.wait(150) == 0, second.output
    assert not list((second.save / ".uploading").iterdir())
    found = store.objects()
    there = sorted({name.split("/")[2] for name in found})
    assert there == ["global_step2", "global_step4", "global_step6", "latest"]
    assert {name: found.get(name) for name in copies(second.save, 6)} == copies(second.save, 6)
    assert found["runs/run/latest"] == b"global_step6"
    assert all(row["upload_failures"] == 0 for row in second.rows() if row["iteration"] == 6)
    assert "canary" not in (first.output + second.output).lower()


@pytest.mark.full
def test_a_run_that_is_told_to_stop_leaves_its_uploads_to_the_next(store: Store, tmp_path: Path) -> None:
    """It does not use up its time of grace."""
    config = settings(tmp_path, train_iters=2000, checkpoint_factor=1000, s3_path=f"s3://{BUCKET}/runs")
    slow = [{"site": "upload", "action": "sleep", "value": 600, "times": 9}]
    job = Job(tmp_path, config, faults=slow, env=store.env)
    job.until("    3/    2000")
    job.signal_rank(0, 15)
    job.wait(60)
    assert "not uploaded yet: global_step" in job.output
    assert len(list((job.save / ".uploading").iterdir())) == 1


@pytest.mark.full
def test_a_bucket_that_is_not_there_is_said_at_the_start(store: Store, tmp_path: Path) -> None:
    job = Job(tmp_path, settings(tmp_path, s3_path="s3://absent/runs"), env=store.env)
    assert job.wait(100) == 77, job.output
    assert "there is no such bucket" in job.output and "Traceback" not in job.output
