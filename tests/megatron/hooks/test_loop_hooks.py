# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, evaluation and stopping: when each acts."""

from __future__ import annotations

import doctest
import io
import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.errors import ConfigError, TrainingError
from megatron.hooks import checkpointing
from megatron.hooks.base import Hook, TrainState, Verdict
from megatron.hooks.build import RunParts, assemble
from megatron.hooks.checkpointing import CheckpointHook, SavePlan, is_save_iteration
from megatron.hooks.profiling import ProfilingHook
from megatron.hooks.stopping import Limits, StopHook, StopRequest, WallClock
from megatron.hooks.trackers import tracker_ids
from megatron.hooks.validation import ValidationHook
from megatron.launch.signals import noting_signals
from megatron.log import setup_logging
from support.fake_engine import FakeCheckpoints, FakeEngine, drive, result
from tests.support.log_lines import parse_evaluation, parse_exit


def saves(plan: SavePlan, steps: int, start: int = 0, extra: Hook | None = None) -> list[int]:
    kept = FakeCheckpoints()
    drive([CheckpointHook(plan=plan, checkpoints=kept), *([extra] if extra else [])], [result()] * steps, start=start)
    return kept.steps


def test_when_checkpoints_are_written() -> None:
    assert saves(SavePlan(factor=2), 5) == [2, 4, 5]
    assert saves(SavePlan(factor=2), 4) == [2, 4]  # the last is not written twice
    assert saves(SavePlan(factor=2, extra=frozenset({0, 3})), 4) == [0, 2, 3, 4]
    assert saves(SavePlan(extra=frozenset({0})), 0) == [0]
    assert saves(SavePlan(factor=2, extra=frozenset({0})), 2, start=2) == [4]
    assert saves(SavePlan(factor=2), 0, start=4) == []  # a finished run that is started again
    assert saves(SavePlan(factor=100), 9, extra=StopHook(exit_interval=3)) == [3]
    assert doctest.testmod(checkpointing).failed == 0


def test_a_failed_save_is_counted_and_the_last_state_tried_again() -> None:
    kept, told = FakeCheckpoints(failing=frozenset({2, 4})), []
    hook = CheckpointHook(plan=SavePlan(factor=2), checkpoints=kept, report=lambda values, row: told.append((values, row)))
    drive([hook], [result()] * 4)
    assert kept.steps == [2, 4, 4]  # what step 4's failure left undone is done at the end
    assert [row["checkpoint_failures"] for _, row in told] == [1.0, 1.0, 2.0]
    assert kept.calls == ["poll"] * 4 + ["finish"]


@given(st.floats(1.01, 10), st.integers(1, 5000))
def test_logarithmic_plan_equals_enumeration(factor: float, iteration: int) -> None:
    powers, power = set(), 1.0
    k = 0
    while power <= 5001:
        powers.add(math.floor(factor**k))
        k, power = k + 1, factor ** (k + 1)
    assert is_save_iteration(iteration, SavePlan(factor=factor, logarithmic=True)) == (iteration in powers)


def evaluations(out: io.StringIO, steps: int, start: int = 0, target: int | None = None, **options: Any) -> tuple[list[str], list[str]]:
    """Prefixes printed and passes made."""
    setup_logging(rank=0, stream=out)
    passes: list[str] = []

    def evaluate(split: str, iters: int) -> dict[str, float]:
        passes.append(f"{split} {iters}")
        return {"margin": 0.5, "lm_loss": 2.0}

    values: dict[str, Any] = {"interval": 2, "iters": 3, "valid": True, "test": True}
    drive([ValidationHook(evaluate=evaluate, **{**values, **options})], [result()] * steps, start=start, target=target)
    blocks = [block for block in map(parse_evaluation, out.getvalue().splitlines()) if block]
    assert all(list(block.metrics) == ["lm_loss", "margin", "lm_loss_ppl"] for block in blocks)
    return [f"{block.chart} {block.prefix}" for block in blocks], passes


def test_when_the_model_is_evaluated() -> None:
    end = "the end of training for"
    blocks, passes = evaluations(io.StringIO(), 4)
    assert blocks == [*(f"validation iteration {i}" for i in (0, 2, 4)), f"validation {end} val data", f"test {end} test data"]
    assert passes == ["valid 3"] * 3 + ["test 3"]  # the final validation is the one of iteration 4
    blocks, passes = evaluations(io.StringIO(), 3, start=4, test=False)
    assert blocks == ["validation iteration 6", f"validation {end} val data"] and len(passes) == 2
    assert evaluations(io.StringIO(), 3, valid=False)[1] == ["test 3"]
    assert evaluations(io.StringIO(), 3, target=9, at_start=False)[1] == ["valid 3"]  # stopped early: no final passes


def test_the_block_is_three_lines() -> None:
    out = io.StringIO()
    evaluations(out, 1, test=False)
    rule, line, end = out.getvalue().splitlines()[:3]
    assert rule == end == "-" * (len(line) + 1)


class Signalled(Hook):
    """Sends this process a signal in a given step."""

    def __init__(self, number: int, at: int) -> None:
        self.number, self.at = number, at

    def after_step(self, state: TrainState, *_: Any) -> Verdict:  # type: ignore[override]
        if state.iteration == self.at:
            os.kill(os.getpid(), self.number)
        return Verdict.CONTINUE


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGUSR1, 75)])
def test_a_signal_stops_at_the_step_boundary(number: int, status: int) -> None:
    out, before, kept = io.StringIO(), signal.getsignal(number), FakeCheckpoints()
    setup_logging(rank=0, stream=out)
    with noting_signals() as received:
        stop = StopRequest(received)
        save = CheckpointHook(plan=SavePlan(), checkpoints=kept)
        state = drive([Signalled(number, 3), save, StopHook(stop)], [result()] * 9)
    assert state.iteration == 3 and kept.steps == [3] and stop.reason == signal.Signals(number).name
    assert stop.status(kept=True) == status and StopRequest().status(kept=False) == 0
    assert stop.status(kept=False) == (76 if status == 75 else status)
    leaving = [found for found in map(parse_exit, out.getvalue().splitlines()) if found]
    assert [found[:2] for found in leaving] == [(0, 3)]
    assert signal.getsignal(number) is before


def test_other_reasons_to_stop() -> None:
    assert drive([StopHook(exit_interval=4)], [result()] * 9).iteration == 4
    ticks = iter(range(100))
    wall = WallClock(Limits(duration_s=5.0), clock=lambda: float(next(ticks)))
    assert drive([StopHook(StopRequest(wall=wall))], [result()] * 9).iteration == 5
    # Another rank's wish is this rank's wish.
    asked: list[bool] = []

    def anywhere(flag: bool) -> bool:
        asked.append(flag)
        return len(asked) == 2

    other = StopRequest(any_rank=anywhere)
    assert drive([StopHook(other)], [result()] * 9).iteration == 2
    assert asked == [False, False, False] and "another rank" in str(other.reason) and other.status(kept=True) == 75
    finished = StopHook(exit_interval=3)
    assert drive([finished], [result()] * 3).iteration == 3  # at the end there is nothing to stop


def test_profile_of_some_steps(tmp_path: Path) -> None:
    drive([ProfilingHook(start=1, stop=3, directory=tmp_path)], [result()] * 5)
    (trace,) = tmp_path.iterdir()
    assert trace.name == "trace_rank0_iterations1-3.json" and "traceEvents" in json.loads(trace.read_text())


def arguments(tmp_path: Path, **logs: Any) -> Any:
    log_keys: dict[str, Any] = dict.fromkeys(
        ("tensorboard_dir", "log_dir", "peak_theoretical_tflops", "use_comet", "wandb_group", "wandb_run_name", "wandb_team")
        + ("log_grad_pct_zeros", "log_param_norm", "log_grad_norm", "log_optimizer_states", "log_gradient_noise_scale", "memory_profiling")
    )
    log_keys |= {"log_interval": 2, "use_wandb": False, "wandb_project": "neox", "wandb_host": "https://api.wandb.ai"}
    log_keys |= {"wandb_init_all_ranks": False, "profile": False, "profile_step_start": 1, "profile_step_stop": 2}
    save = {"save": str(tmp_path), "checkpoint_factor": 2, "checkpoint_scale": "linear", "extra_save_iters": [0]}
    run: dict[str, Any] = {"eval_interval": 2, "eval_iters": 1, "do_valid": None, "do_test": None, "exit_interval": None}
    run |= {"nonfinite_policy": "stop", "nonfinite_limit": 10, "rollback_limit": 3, "replica_check_interval": None}
    run |= {"loss_spike_factor": None, "loss_spike_window": 50, "loss_spike_patience": 3, "loss_spike_policy": "warn"}
    return SimpleNamespace(
        logs=SimpleNamespace(**{**log_keys, **logs}),
        checkpoint=SimpleNamespace(**save),
        run=SimpleNamespace(**run),
        to_flat=lambda: {"hidden_size": 64},
    )


def test_assembled_hooks_make_a_run(tmp_path: Path) -> None:
    out, kept = io.StringIO(), FakeCheckpoints()
    setup_logging(rank=0, stream=out)
    parts = RunParts(
        checkpoints=kept,
        evaluate=lambda split, iters: {"lm_loss": 1.0},
        splits=frozenset({"valid"}),
        tracker_ids=tracker_ids({}),
    )
    drive(assemble(arguments(tmp_path), parts), [result()] * 4)
    assert kept.steps == [0, 2, 4]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["iteration"], "valid_lm_loss" in r) for r in rows] == [
        (0, True),
        (1, False),
        (2, False),
        (2, True),
        (3, False),
        (4, False),
        (4, True),
    ]
    assert out.getvalue().count("lm_loss: 2.000000E+00") == 2 and "the end of training for val data" in out.getvalue()
    # Another rank evaluates and saves too, but says and writes nothing.
    others = assemble(arguments(tmp_path), RunParts(rank=1, checkpoints=FakeCheckpoints(), evaluate=parts.evaluate, splits=parts.splits))
    assert "ConsoleHook" not in [type(hook).__name__ for hook in others]
    before = (tmp_path / "metrics.jsonl").read_text()
    drive(others, [result()] * 2)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_no_state_is_saved_after_a_loss_that_is_none(tmp_path: Path) -> None:
    kept = FakeCheckpoints()
    parts = RunParts(checkpoints=kept)
    with pytest.raises(TrainingError):
        drive(assemble(arguments(tmp_path), parts), [result(), result(float("nan"))])
    assert kept.steps == [0] and kept.calls[-1] == "abandon"
    assert [row["lm_loss"] for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())] == [2.0, None]


def test_requests_that_cannot_be_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match="no key"):
        assemble(arguments(tmp_path, use_wandb=True), RunParts())
    assemble(arguments(tmp_path, use_wandb=None), RunParts())
    args = arguments(tmp_path, profile=True)
    args.checkpoint.save = None
    out = io.StringIO()
    setup_logging(rank=0, stream=out)
    with pytest.raises(ConfigError, match="profile needs a folder"):
        assemble(args, RunParts())
    assert "no metrics.jsonl is written" in out.getvalue()


def test_tracker_ids_are_kept() -> None:
    ids = tracker_ids({})
    assert set(ids) == {"wandb", "comet"} and ids != tracker_ids({})
    assert tracker_ids({"tracker_ids": ids}) == ids
    assert FakeEngine().module() is not None
