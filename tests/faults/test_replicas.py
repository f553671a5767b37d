# SPDX-License-Identifier: Apache-2.0
"""A weight that differs between ranks which should hold the same ends the run within the interval, naming both (F21)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.jobs import Job, settings

pytestmark = [pytest.mark.dist, pytest.mark.timeout(160)]

LAST_EXPONENT_BIT = 23


def run(folder: Path, world: int, fault: dict[str, Any] | None, status: int, **changes: Any) -> str:
    """The output of a run of 6 steps that looks after every second one."""
    config = settings(folder, world, **{"train_iters": 6, "replica_check_interval": 2, "checkpoint_factor": 1, **changes})
    job = Job(folder, config, faults=[fault] if fault else [], launched=False)
    assert job.wait(150) == status, job.output[-3000:]
    return job.output


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    output = run(tmp_path, 2, {"site": "weight", "rank": 1, "step": 3, "action": "flip", "value": LAST_EXPONENT_BIT}, 1)
    assert "ranks that should hold the same weights do not" in output
    assert "0.word_embeddings.weight: ranks 0, 1 hold different ones" in output
    assert "iteration 4, replica_check_interval 2" in output and "They were equal at iteration 2" in output
    # What was found bad is not saved.
    assert not (tmp_path / "run" / "global_step4").exists() and (tmp_path / "run" / "global_step3").exists()


@pytest.mark.full
def test_a_wrong_sum_of_gradients_is_found(tmp_path: Path) -> None:
    output = run(tmp_path, 2, {"site": "reduced", "rank": 1, "step": 5, "action": "scale", "value": 1.25}, 1)
    assert "iteration 6, replica_check_interval 2" in output and "They were equal at iteration 4" in output


@pytest.mark.full
def test_of_three_the_odd_one_is_named(tmp_path: Path) -> None:
    fault = {"site": "weight", "rank": 2, "step": 2, "action": "flip", "value": 0}
    output = run(tmp_path, 3, fault, 1, train_batch_size=6)
    assert "rank 2 holds another than ranks 0, 1" in output and "iteration 2, " in output


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2])
def test_under_zero_a_copy_is_seen_right_after_it_was_handed_out(tmp_path: Path, stage: int) -> None:
    fault = {"site": "weight", "rank": 1, "action": "flip", "value": 0}
    zero = {"zero_optimization": {"stage": stage}, "precision": "bfloat16"}
    assert "ranks 0, 1 hold different ones" in run(tmp_path / "at", 2, {**fault, "step": 4}, 1, **zero)
    # The next update hands the weights out anew: after step 3 the flip is gone by the look after step 4.
    run(tmp_path / "between", 2, {**fault, "step": 3}, 0, **zero)


@pytest.mark.full
@pytest.mark.parametrize(
    "changes",
    [
        {"model_parallel_size": 2},
        {"model_parallel_size": 2, "sequence_parallel": True},
        {"pipe_parallel_size": 2},
        {"pipe_parallel_size": 2, "style": "gpt2", "precision": "bfloat16"},
        {"context_parallel_size": 2, "attention_dropout": 0.0},
        {"precision": "bfloat16"},
        {"zero_optimization": {"stage": 2}},
    ],
    ids=["tensor", "sequence", "pipeline", "tied", "context", "bfloat16", "zero2"],
)
def test_no_false_alarm(tmp_path: Path, changes: dict[str, Any]) -> None:
    run(tmp_path, 2, None, 0, replica_check_interval=1, **changes)
