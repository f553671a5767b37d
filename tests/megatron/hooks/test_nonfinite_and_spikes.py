# SPDX-License-Identifier: Apache-2.0
"""What follows from NaN or Inf and from losses that jump, step by step."""

from __future__ import annotations

import doctest
from collections.abc import Mapping
from typing import Any

import pytest

from megatron.engine.base import StepResult
from megatron.errors import DivergenceError, TrainingError
from megatron.hooks import nonfinite_and_spikes
from megatron.hooks.base import TrainState, Verdict
from megatron.hooks.nonfinite_and_spikes import ActingHook, NumbersHook, NumbersPlan, Policy, Record, RollbackRequest
from support.fake_engine import FakeEngine, result

BAD = {"skipped": True, "not_finite": "loss on rank 1"}


class Run:
    """Hooks and the state they are shown; steps of 4 samples."""

    def __init__(self, record: Record | None = None, **plan: Any) -> None:
        self.sent: dict[str, float] = {}
        self.record = record or Record()
        self.numbers = NumbersHook(plan=NumbersPlan(**plan), record=self.record, send=self.send)
        self.acting = ActingHook(self.numbers)
        self.state = TrainState(target=1000)

    def send(self, values: Mapping[str, float], row: Mapping[str, float]) -> None:
        self.sent |= row

    def step(self, *results: StepResult) -> Verdict:
        for each in results:
            self.state = self.state.after(samples=each.samples, tokens=each.tokens)
            self.numbers.after_step(self.state, each, FakeEngine())
            verdict = self.acting.after_step(self.state, each, FakeEngine())
        return verdict

    def back(self, iteration: int) -> None:
        self.record.went_back(iteration)
        self.state = TrainState(iteration=iteration, target=1000, samples=4 * iteration)
        self.numbers.after_rollback(self.state, FakeEngine())


def test_stop_names_step_and_samples() -> None:
    run = Run()
    run.step(result(), result())
    with pytest.raises(DivergenceError, match="not finite: loss on rank 1") as caught:
        run.step(result(float("nan"), **BAD))
    assert caught.value.where == "iteration 3, samples [8, 12)" and caught.value.exit_code == 78 and "lr" in str(caught.value.fix)
    assert doctest.testmod(nonfinite_and_spikes).failed == 0


def test_skip_counts_and_has_a_limit() -> None:
    run = Run(nonfinite=Policy.SKIP, nonfinite_limit=2)
    assert run.step(result(**BAD), result(**BAD), result(), result(**BAD)) is Verdict.CONTINUE
    assert run.sent == {"skipped_nonfinite": 3}
    resumed = Run(Record.of(run.record.kept()), nonfinite=Policy.SKIP, nonfinite_limit=2)
    resumed.step(result(**BAD))
    assert resumed.sent == {"skipped_nonfinite": 4}
    with pytest.raises(DivergenceError, match="3 steps in a row made no update"):
        resumed.step(result(**BAD))


@pytest.mark.parametrize("policy", [Policy.STOP, Policy.SKIP])
@pytest.mark.parametrize("step", [result(float("nan")), result(grad_norm=float("inf"))], ids=["loss", "norm"])
def test_what_has_been_used_in_an_update_cannot_be_skipped(policy: Policy, step: StepResult) -> None:
    with pytest.raises(DivergenceError, match="loss = nan|grad_norm = inf"):
        Run(nonfinite=policy).step(result(), step)
    assert Run(nonfinite=Policy.ROLLBACK).step(result(), step) is Verdict.ROLLBACK
    assert Run().step(result(metrics={"lm_loss": 1.0, "margin": float("nan")})) is Verdict.CONTINUE


def test_fp16_overflows_are_another_matter() -> None:
    overflow = result(float("inf"), skipped=True, loss_scale=2.0)
    run = Run(overflows=3)
    run.step(overflow, overflow, result(), overflow, overflow)
    assert not run.sent
    with pytest.raises(TrainingError, match="last 3 steps overflowed") as caught:
        run.step(overflow)
    assert not isinstance(caught.value, DivergenceError)


def test_rollback_leaves_the_samples_out_and_has_a_limit() -> None:
    run = Run(nonfinite=Policy.ROLLBACK, rollback_limit=2)
    assert run.step(*[result()] * 5, result(**BAD)) is Verdict.ROLLBACK
    assert run.record.wanted == RollbackRequest(before=5, samples=((20, 24),))
    run.back(4)
    assert run.step(result(), result()) is Verdict.CONTINUE and run.sent == {"rollbacks": 1}
    # Step 7 is at position 24, which is sample 28 now.
    assert run.step(result(**BAD)) is Verdict.ROLLBACK
    assert run.record.wanted == RollbackRequest(before=6, samples=((28, 32),))
    run.back(4)
    run = Run(Record.of(run.record.kept()), nonfinite=Policy.ROLLBACK, rollback_limit=2)
    assert run.record.skipped.ranges == ((20, 24), (28, 32))
    with pytest.raises(DivergenceError, match="went back 2 times already"):
        run.step(result(**BAD))


def test_spikes_are_steps_in_a_row_far_above_the_median() -> None:
    plan: dict[str, Any] = {"spike_factor": 3.0, "spike_window": 20, "spike_patience": 3, "spike": Policy.ROLLBACK}
    run = Run(**plan)
    # Too little is known; then too short; then not far enough.
    assert run.step(*[result(2.0)] * 8, *[result(40.0)] * 3, *[result(2.0)] * 9) is Verdict.CONTINUE
    assert run.step(result(40.0), result(40.0), result(2.0), result(5.9), result(5.9), result(5.9)) is Verdict.CONTINUE
    assert run.step(result(40.0), result(40.0)) is Verdict.CONTINUE and not run.sent
    assert run.step(result(40.0)) is Verdict.ROLLBACK
    assert run.record.wanted == RollbackRequest(before=26, samples=((104, 116),)) and run.sent == {"loss_spikes": 1}
    run.back(20)
    assert max(number for number, _ in run.record.losses) == 20 and run.record.skipped.ranges == ((104, 116),)
    # A resumed run compares with the same losses.
    resumed = Run(Record.of(run.record.kept()), **{**plan, "spike_patience": 1, "spike": Policy.STOP})
    with pytest.raises(DivergenceError, match="loss spike: 7 where 2 is usual"):
        resumed.step(result(7.0))


def test_a_warning_is_given_once() -> None:
    run = Run(spike_factor=2.0, spike_window=4, spike_patience=2)
    assert run.step(*[result(1.0)] * 4, *[result(9.0)] * 6, result(1.0), result(9.0)) is Verdict.CONTINUE
    assert run.sent == {"loss_spikes": 1}
    run.step(result(9.0))
    assert run.sent == {"loss_spikes": 2}


def test_another_rank_sees_the_spike() -> None:
    run = Run(spike_factor=2.0, spike_window=1, spike_patience=1, spike=Policy.STOP)
    run.numbers._any_rank = lambda flag: True
    with pytest.raises(DivergenceError, match="loss spike"):
        run.step(result(1.0))


def test_the_loss_itself_is_watched_whatever_the_metrics_are_called() -> None:
    """A preference loss with its metrics: the accuracy comes first in the alphabet, and jumps without meaning anything."""
    plan: dict[str, Any] = {"spike_factor": 3.0, "spike_window": 20, "spike_patience": 2, "spike": Policy.ROLLBACK}

    def step(loss: float, accuracy: float) -> StepResult:
        return result(loss, metrics={"accuracy": accuracy, "dpo_loss": loss})

    run = Run(**plan)
    assert run.step(*[step(0.7, 0.1)] * 12, *[step(0.7, 1.0)] * 4) is Verdict.CONTINUE
    assert run.step(*[step(7.0, 0.1)] * 2) is Verdict.ROLLBACK
