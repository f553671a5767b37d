# SPDX-License-Identifier: Apache-2.0
"""Learning rates against recorded ones, against closed forms, and across a resume."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.errors import ConfigError
from megatron.optim.schedules import Decay, LRScheduler, OnResume, ScheduleSpec, lr_at

GOLDEN = Path(__file__).parents[2] / "golden" / "optim" / "cosine_8.json"
COSINE = ScheduleSpec(start_lr=1e-3, decay_style=Decay.COSINE, warmup_iter=2.0, end_iter=8, min_lr=1e-4)


def optimizer(groups: int = 2) -> SimpleNamespace:
    return SimpleNamespace(param_groups=[{"lr": 0.0} for _ in range(groups)])


def test_recorded_rates_exactly() -> None:
    recorded = json.loads(GOLDEN.read_text())["lr_after_step"]
    opt = optimizer()
    scheduler = LRScheduler(opt, COSINE)
    assert scheduler.get_lr() == [recorded[0]] * 2
    for rate in recorded:
        scheduler.step()
        assert scheduler.get_last_lr() == [rate, rate] == [g["lr"] for g in opt.param_groups]


specs = st.builds(
    ScheduleSpec,
    start_lr=st.floats(1e-5, 1.0),
    decay_style=st.sampled_from(list(Decay)),
    warmup_iter=st.floats(0, 40),
    end_iter=st.integers(1, 200),
    min_lr=st.floats(0, 1e-5),
    wsd_decay_fraction=st.floats(0.05, 1.0),
)


@given(specs, st.integers(0, 500))
def test_properties(spec: ScheduleSpec, step: int) -> None:
    rate = lr_at(step, spec)
    assert 0 < rate <= spec.start_lr * (1 + 1e-12) or (rate == spec.min_lr == 0)
    if step > spec.warmup_iter:
        assert rate >= spec.min_lr
        assert lr_at(step + 1, spec) <= rate * (1 + 1e-9)  # never rises after warm-up, so never after the end
    elif step >= 1:
        assert lr_at(step + 1, spec) >= rate or step + 1 > spec.warmup_iter
    ends = spec.decay_style in (Decay.LINEAR, Decay.COSINE, Decay.WSD)
    if ends and step >= spec.end_iter and step > spec.warmup_iter and spec.end_iter - spec.warmup_iter >= 1:
        assert rate == pytest.approx(spec.min_lr, rel=1e-9, abs=1e-18)


def test_closed_forms() -> None:
    def at(style: Decay, step: int, **change: float) -> float:
        return lr_at(step, replace(COSINE, decay_style=style, warmup_iter=10.0, end_iter=110, **change))  # type: ignore[arg-type]

    assert at(Decay.CONSTANT, 5) == 0.5e-3 and at(Decay.CONSTANT, 500) == 1e-3
    assert at(Decay.LINEAR, 60) == pytest.approx(0.55e-3) and at(Decay.LINEAR, 110) == 1e-4
    assert at(Decay.EXPONENTIAL, 110) == pytest.approx(1e-3 * math.exp(-0.693))
    assert at(Decay.WSD, 99) == 1e-3 and at(Decay.WSD, 104, wsd_decay_fraction=0.1) == pytest.approx(1e-4 + 9e-4 * 6 / 11)
    assert at(Decay.INVERSE_SQRT, 40) == pytest.approx(0.5e-3) and at(Decay.INVERSE_SQRT, 100000) == 1e-4
    assert at(Decay.COSINE, 165) == 1e-4  # the reference rises again here
    # A warm-up shorter than a step never gives more than the peak.
    assert lr_at(0, replace(COSINE, warmup_iter=0.08)) == 1e-3


@pytest.mark.parametrize("style", list(Decay))
def test_state_round_trip(style: Decay) -> None:
    spec = replace(COSINE, decay_style=style)
    first = LRScheduler(optimizer(), spec)
    for _ in range(5):
        first.step()
    state = first.state_dict()
    assert set(state) - {"wsd_decay_fraction"} == {"start_lr", "warmup_iter", "num_iters", "decay_style", "end_iter", "min_lr"}
    assert ("wsd_decay_fraction" in state) == (style is Decay.WSD)
    assert json.loads(json.dumps(state)) == state and type(state["decay_style"]) is str
    second = LRScheduler(optimizer(), spec)
    second.load_state_dict(state)
    first.step(), second.step()
    assert first.get_lr() == second.get_lr() and second.num_iters == 6


def test_a_changed_schedule_is_refused_by_name_or_decided_by_flag() -> None:
    saved = LRScheduler(optimizer(), COSINE)
    for _ in range(4):
        saved.step()
    new = replace(COSINE, start_lr=2e-3, decay_style=Decay.LINEAR)
    with pytest.raises(ConfigError) as caught:
        LRScheduler(optimizer(), new).load_state_dict(saved.state_dict())
    text = caught.value.report()
    assert "optimizer.params.lr: 0.001 in the checkpoint, 0.002 in the configuration" in text
    assert "lr_decay_style: cosine in the checkpoint, linear in the configuration" in text
    assert "min_lr" not in text and "override_lr_scheduler" in text and "use_checkpoint_lr_scheduler" in text

    mine = LRScheduler(optimizer(), new, on_resume=OnResume.CONFIGURED)
    mine.load_state_dict(saved.state_dict())
    assert mine.num_iters == 4 and mine.get_lr() == [lr_at(4, new)] * 2
    theirs = LRScheduler(optimizer(), new, on_resume=OnResume.SAVED)
    theirs.load_state_dict(saved.state_dict())
    assert theirs.spec == COSINE and theirs.get_lr() == [lr_at(4, COSINE)] * 2
