# SPDX-License-Identifier: Apache-2.0
"""An engine that computes nothing, and a loop that drives hooks with given results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.steps.write import RankFileWriter
from megatron.data.batch import Batch
from megatron.engine.base import LocalShards, StepResult
from megatron.hooks.base import Hook, TrainState, Verdict
from megatron.model.spec import ModelSpec
from megatron.mpu.context import ContextPlan
from megatron.mpu.groups import Groups
from megatron.objectives.base import Objective, Read


@dataclass
class FakeEngine:
    """Has groups, a device and a module; its steps are never taken."""

    groups: Groups = field(default_factory=Groups.single)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    context: ContextPlan = field(default_factory=ContextPlan)
    saved: list[str] = field(default_factory=list)

    def train_step(self, objective: Objective, micro_batches: Sequence[Batch]) -> StepResult:
        raise NotImplementedError

    def eval_step(self, objective: Objective, micro_batches: Iterable[Batch]) -> Mapping[str, float]:
        raise NotImplementedError

    def score(self, batches: Iterable[Batch], read: Read) -> list[torch.Tensor]:
        raise NotImplementedError

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def save(self, directory: Path, tag: str, client_state: Mapping[str, Any], writing: RankFileWriter) -> None:
        writing.add(client_state, directory / tag / "mp_rank_00_model_states.pt")
        self.saved.append(tag)

    def load(self, directory: Path, tag: str, spec: ModelSpec) -> dict[str, Any]:
        return {}

    def set_schedule_step(self, steps: int) -> None:
        """Nothing."""

    def module(self) -> torch.nn.Module:
        return torch.nn.Identity()

    def local_shards(self) -> LocalShards:
        raise NotImplementedError

    def before_update(self, look: Callable[[], None]) -> None:
        """There are no updates."""


@dataclass
class FakeCheckpoints:
    """Keeps the steps it was asked to save. failing: those whose save fails"""

    steps: list[int] = field(default_factory=list)
    failing: frozenset[int] = frozenset()
    saved: int | None = None
    failures: int = 0
    seconds: float | None = None
    calls: list[str] = field(default_factory=list)

    def save(self, iteration: int, samples: int, tokens: int, *, last: bool = False) -> None:
        self.steps.append(iteration)
        if iteration in self.failing:
            self.failures += 1
        else:
            self.saved = iteration

    def poll(self) -> None:
        self.calls.append("poll")

    def finish(self, *, last: bool = False) -> None:
        self.calls.append("finish")

    def abandon(self, error: BaseException) -> None:
        self.calls.append("abandon")


def result(loss: float = 2.0, **change: Any) -> StepResult:
    """A step of 0.5 s over 4 samples of 8 tokens."""
    values: dict[str, Any] = {
        "loss": loss,
        "metrics": {"lm_loss": loss},
        "learning_rate": 1e-3,
        "grad_norm": 1.5,
        "seconds": 0.5,
        "samples": 4,
        "tokens": 32,
    }
    return StepResult(**{**values, **change})


def drive(
    hooks: Sequence[Hook], results: Sequence[StepResult], *, start: int = 0, target: int | None = None, engine: FakeEngine | None = None
) -> TrainState:
    """The training loop without training: returns the state it ended in."""
    engine = engine or FakeEngine()
    state = TrainState(iteration=start, target=start + len(results) if target is None else target, samples=4 * start, tokens=32 * start)
    try:
        for hook in hooks:
            hook.on_start(state, engine)
        for step in results:
            state = state.after(samples=step.samples, tokens=step.tokens)
            verdicts = [hook.after_step(state, step, engine) for hook in hooks]
            if Verdict.STOP in verdicts:
                break
        for hook in hooks:
            hook.on_stop(state, engine)
    except BaseException as error:
        for hook in hooks:
            hook.on_error(state, error)
        raise
    return state
