# SPDX-License-Identifier: Apache-2.0
"""A request to stop, to any one rank and in any phase: one checkpoint of all, exit status 75, and the next start goes on from there."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from support.jobs import Job, settings

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]

VALIDATING = {"eval_interval": 2, "eval_iters": 4}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "tensor": {"model_parallel_size": 2},
    "pipeline": {"pipe_parallel_size": 2},
}


def asked_at(site: str, number: str, *, step: int, rank: int = 1, **more: Any) -> dict[str, Any]:
    """A signal to one rank as it passes a place."""
    return {"site": site, "rank": rank, "step": step, "action": "signal", "value": number, **more}


def steps(job: Job) -> list[str]:
    return sorted(entry.name for entry in job.save.glob("global_step*"))


@pytest.mark.parametrize(
    ("phase", "layout", "fault", "expected", "more"),
    [
        ("set-up", "data", asked_at("set-up", "SIGTERM", step=0), 1, {}),
        ("step", "tensor", asked_at("step", "SIGUSR1", step=3), 3, {}),
        ("accumulation", "data", asked_at("micro_batch", "SIGTERM", step=3, skip=1), 3, {}),
        # The second micro batch of the pass after step 2; the pass is broken off and step 2 is the last.
        ("evaluation", "pipeline", asked_at("evaluate", "SIGUSR1", step=2, skip=1), 2, VALIDATING),
        pytest.param("evaluation", "data", asked_at("evaluate", "SIGTERM", step=2, skip=2, rank=0), 2, VALIDATING, marks=pytest.mark.full),
        pytest.param("save", "data", asked_at("save", "SIGTERM", step=4), 4, {"checkpoint_factor": 4}, marks=pytest.mark.full),
        pytest.param("accumulation", "pipeline", asked_at("micro_batch", "SIGUSR1", step=3, skip=1), 3, {}, marks=pytest.mark.full),
        pytest.param("step", "pipeline", asked_at("step", "SIGTERM", step=3, rank=0), 3, {}, marks=pytest.mark.full),
    ],
)
def test_one_rank_is_asked_and_all_stop_together(
    tmp_path: Path, phase: str, layout: str, fault: dict[str, Any], expected: int, more: dict[str, Any]
) -> None:
    config = settings(tmp_path, 2, train_iters=8, **{**LAYOUTS[layout], **more})
    job = Job(tmp_path, config, faults=[fault])
    assert job.wait(110) == 75, job.output
    assert steps(job) == [f"global_step{expected}"], phase
    assert "failed first" not in job.output and "Traceback" not in job.output
    assert sorted(job.losses()) == list(range(1, expected + 1))
    if phase == "evaluation":
        assert "was broken off" in job.output
        # What was seen of the validation data is not reported as the whole.
        assert not any("valid_lm_loss" in row and row["iteration"] == expected for row in job.rows())
    # A save under way is finished, and not made twice.
    assert job.output.count("successfully saved checkpoint") == 1
    again = Job(tmp_path, {**config, "train_iters": expected + 1}, launched=False)
    assert again.wait(110) == 0, again.output
    assert f"starting from iteration {expected}" in again.output


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_the_launcher_hands_a_request_on_and_waits(tmp_path: Path, number: int) -> None:
    """A save that takes longer than launchers like to wait is finished, and the launcher's status is that of its ranks."""
    slow = [{"site": "save", "action": "sleep", "value": 8}]
    job = Job(tmp_path, settings(tmp_path, 2, train_iters=100000), faults=slow)
    job.until("iteration        3/")
    began = time.monotonic()
    job.process.send_signal(number)
    assert job.wait(110) == 75, job.output
    assert time.monotonic() - began > 8
    (saved,) = steps(job)
    assert (job.save / "latest").read_text() == saved and "failed first" not in job.output
    assert not job.pids()


def test_the_job_ends_before_slurm_ends_it(tmp_path: Path) -> None:
    """The stop is so early that another save and two more steps would be in time; with no time left at all nothing is begun."""
    ends = time.time() + 30
    fault = [{"site": "step", "action": "sleep", "value": 0.3, "times": 1000}]
    config = settings(tmp_path, 1, train_iters=1000, exit_margin_in_secs=10, grace_in_secs=0.01)
    job = Job(tmp_path, config, faults=fault, env={"SLURM_JOB_END_TIME": str(int(ends))})
    assert job.wait(110) == 75, job.output
    assert time.time() < ends
    (left,) = re.findall(r"stopping after this step: the job ends in (\d+) s", job.output)
    assert int(left) <= 12
    # The grace is shorter than the save that was measured.
    assert "only 0.0 s are left after the request" in job.output
    (saved,) = steps(job)
    late = Job(tmp_path, config, env={"SLURM_JOB_END_TIME": str(int(time.time()))})
    assert late.wait(110) == 76, late.output
    assert steps(late) == [saved] and "before a step could be made" in late.output


def test_ctrl_c_saves_and_says_so(tmp_path: Path) -> None:
    job = Job(tmp_path, settings(tmp_path, 1, train_iters=8), faults=[asked_at("step", "SIGINT", step=2, rank=0)])
    assert job.wait(110) == 130, job.output
    assert steps(job) == ["global_step2"]


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.full)])
def test_generation_keeps_the_texts_it_has_finished(tmp_path: Path, world: int) -> None:
    """Under a launcher, too, this is no failure to report."""
    trained = settings(tmp_path, 1, train_iters=1)
    assert Job(tmp_path, trained).wait(110) == 0
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n\nthe one\n\nthe other and the third\n\n")
    asked = {"text_gen_type": "input-file", "sample_input_file": str(prompts), "prompt_end": "\n\n", "maximum_tokens": 4}
    asked["sample_output_file"] = str(tmp_path / "texts.jsonl")
    fault = {"site": "generate", "action": "signal", "value": "SIGTERM", "skip": 1, "rank": 0}
    job = Job(tmp_path, {**trained, **asked, "global_num_gpus": world}, faults=[fault], script="generate.py")
    assert job.wait(110) == 75, job.output
    assert "failed first" not in job.output
    lines = (tmp_path / "texts.jsonl").read_text().splitlines()
    assert [json.loads(line)["context"] for line in lines] == ["a"]
    assert "stopped by SIGTERM after 1 of 3 texts" in job.output


@pytest.mark.full
def test_evaluation_keeps_the_split_it_has_finished(tmp_path: Path) -> None:
    trained = settings(tmp_path, 1, train_iters=1, eval_iters=2)
    assert Job(tmp_path, trained).wait(110) == 0
    config = {**trained, "eval_results_prefix": str(tmp_path / "found")}
    # Two iterations of four sequences make eight batches a split.
    fault = {"site": "evaluate", "action": "signal", "value": "SIGTERM", "skip": 9, "rank": 0}
    job = Job(tmp_path, config, faults=[fault], script="eval.py")
    assert job.wait(110) == 75, job.output
    assert "stopped by SIGTERM after 1 split" in job.output and "failed first" not in job.output
    (path,) = tmp_path.glob("found_eval_results*.json")
    assert list(json.loads(path.read_text())["results"]) == ["validation"]
