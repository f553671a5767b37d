# SPDX-License-Identifier: Apache-2.0
"""What an engine does: one optimizer step over micro batches, evaluation, save and load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron.checkpoint.steps.write import RankFileWriter
from megatron.data.batch import Batch
from megatron.model.spec import ModelSpec
from megatron.mpu.context import ContextPlan
from megatron.mpu.groups import Groups
from megatron.objectives.base import Objective, Read


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step, the same on every rank.

    loss:          what was minimised, over the global batch
    metrics:       name -> value over the global batch ("lm_loss" and the objective's others)
    learning_rate: of parameter group 0, as used in this step
    grad_norm:     L2 norm of all gradients before clipping; None where the engine does not know it
    loss_scale:    fp16 only
    skipped:       the update was not made (fp16 overflow, or `not_finite`); such a step does not move the learning-rate schedule
    not_finite:    what of loss and gradient was not finite and on which rank first; "" = all was, or fp16's loss scale was too large
    seconds:       wall time of the step
    samples:       consumed over all data ranks, as the sampler counts them
    tokens:        positions of all rows over all data ranks
    padding:       how many of the tokens are padding
    timings:       phase -> its seconds in this step; empty unless phases are timed
    """

    loss: float
    metrics: Mapping[str, float]
    learning_rate: float
    grad_norm: float | None = None
    loss_scale: float | None = None
    skipped: bool = False
    not_finite: str = ""
    seconds: float = 0.0
    samples: int = 0
    tokens: int = 0
    padding: int = 0
    timings: Mapping[str, float] = field(default_factory=dict)


class LocalShards(Protocol):
    """Parameters, gradients and optimizer state as this rank holds them: flat or in shape, in any precision.

    sharded: the shards of one parameter lie on the data ranks, each entry on one of them; else every data rank has the whole
    """

    @property
    def sharded(self) -> bool: ...

    def weight(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Of a parameter that is trained."""

    def gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """Summed over micro batches and data ranks, not clipped; only inside `Engine.before_update`. None = it took no part."""

    def states(self, parameter: torch.nn.Parameter) -> Mapping[str, torch.Tensor]:
        """Name of the optimizer's state (exp_avg, ...) -> shard; after the first update."""


class Engine(Protocol):
    """A model with its optimizer, hidden behind steps."""

    groups: Groups
    device: torch.device
    context: ContextPlan

    def train_step(self, objective: Objective, micro_batches: Sequence[Batch]) -> StepResult:
        """One optimizer step over this data rank's micro batches; every data rank has as many, and each step may have another number."""

    def eval_step(self, objective: Objective, micro_batches: Iterable[Batch]) -> Mapping[str, float]:
        """Metrics over all micro batches of all data ranks as one sum, without gradients; the same on every rank."""

    def score(self, batches: Iterable[Batch], read: Read) -> list[torch.Tensor]:
        """What `read` gives for each of this data rank's batches, without gradients; on the CPU of every rank. All ranks call it.

        read: makes values of whole rows or documents by the context's sums, e.g. log-probs per document [n]
        """

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the data ranks. All ranks call it."""

    def save(self, directory: Path, tag: str, client_state: Mapping[str, Any], writing: RankFileWriter) -> None:
        """Hand weights and optimizer, as files of directory/tag, to `writing`, which is waited for. All ranks call it."""

    def load(self, directory: Path, tag: str, spec: ModelSpec) -> dict[str, Any]:
        """Read weights, optimizer and schedule that `save` wrote at any layout; returns the client state. All ranks call it.

        spec: the model
        """

    def set_schedule_step(self, steps: int, saved: Mapping[str, Any] | None = None) -> None:
        """Move the learning-rate schedule to where `steps` optimizer steps have been made; `saved` is the checkpoint's schedule."""

    def module(self) -> torch.nn.Module:
        """The model (this stage of it), for inspection."""

    def local_shards(self) -> LocalShards:
        """What of each parameter is on this rank."""

    def before_update(self, look: Callable[[], None]) -> None:
        """Have `look` called on every rank just before each optimizer update, when the gradients are complete."""
