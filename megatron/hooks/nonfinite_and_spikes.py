# SPDX-License-Identifier: Apache-2.0
"""What follows when a loss or gradient is not finite, or the loss jumps. The engine has seen to it that such a gradient updates nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from statistics import median
from typing import Any

from megatron.data.loader import Skipped
from megatron.engine.base import Engine, StepResult
from megatron.errors import DivergenceError, TrainingError
from megatron.hooks.base import Hook, TrainState, Verdict
from megatron.hooks.norms import Send
from megatron.log import get_logger

log = get_logger(__name__)

NUMBERS = "numbers"
"""Key under which checkpoints keep a Record."""

ENOUGH_LOSSES = 10
"""A median of fewer losses (or of fewer than the window, if that is smaller) decides nothing."""

_FIX = "resume from a checkpoint with a lower lr, a longer warmup or a smaller gradient_clipping, and look at the data of these samples"

_COUNTS = ("skipped_nonfinite", "in_a_row", "rollbacks")

Ranges = Sequence[tuple[int, int]]


class Policy(Enum):
    """What follows."""

    WARN = "warn"
    STOP = "stop"
    SKIP = "skip"
    ROLLBACK = "rollback"


@dataclass(frozen=True, kw_only=True)
class NumbersPlan:
    """The keys of these names, shorter.

    overflows: fp16 steps in a row that the loss scale may cost; a few are how it is found
    """

    nonfinite: Policy = Policy.STOP
    nonfinite_limit: int = 10
    rollback_limit: int = 3
    spike_factor: float | None = None
    spike_window: int = 50
    spike_patience: int = 3
    spike: Policy = Policy.WARN
    overflows: int = 50


@dataclass(frozen=True, kw_only=True)
class RollbackRequest:
    """Where to go back to, and what to leave out.

    before:  the checkpoint is of this iteration, or an earlier one
    samples: what is left out from now on, as ranges of sample numbers
    """

    before: int
    samples: tuple[tuple[int, int], ...]


@dataclass(kw_only=True)
class Record:
    """What a run remembers of its numbers; checkpoints keep it.

    skipped_nonfinite: steps without an update so far
    in_a_row:          of them, the last ones
    rollbacks:         how often the run went back
    skipped:           samples that are left out
    losses:            (iteration, loss) of the last ordinary steps
    wanted:            where to go back to, while that is to be done
    """

    skipped_nonfinite: int = 0
    in_a_row: int = 0
    rollbacks: int = 0
    skipped: Skipped = field(default_factory=Skipped)
    losses: list[tuple[int, float]] = field(default_factory=list)
    wanted: RollbackRequest | None = None

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Record:
        """The one that a checkpoint kept, or a new one."""
        found = kept.get(NUMBERS) or {}
        counts: dict[str, Any] = {name: int(found.get(name, 0)) for name in _COUNTS}
        return cls(
            **counts,
            skipped=Skipped().with_ranges((int(start), int(end)) for start, end in found.get("skipped_samples", ())),
            losses=[(int(iteration), float(loss)) for iteration, loss in found.get("losses", ())],
        )

    def kept(self) -> dict[str, Any]:
        """What checkpoints keep."""
        numbers = {name: getattr(self, name) for name in _COUNTS}
        return {NUMBERS: {**numbers, "skipped_samples": [list(pair) for pair in self.skipped.ranges], "losses": list(self.losses)}}

    def went_back(self, iteration: int) -> None:
        """What was wanted is done: the run is at `iteration` again."""
        if self.wanted is not None:
            self.rollbacks += 1
            self.skipped = self.skipped.with_ranges(self.wanted.samples)
        self.losses = [(number, loss) for number, loss in self.losses if number <= iteration]
        self.in_a_row, self.wanted = 0, None


class NumbersHook(Hook):
    """Judges every step. Stands before the metrics, so that its counts are in the step's row; ActingHook does what it has found.

    any_rank: "true on any rank?", the same answer on every rank
    send:     takes numbers for the trackers and for a step's row
    """

    def __init__(self, *, plan: NumbersPlan, record: Record, send: Send, any_rank: Callable[[bool], bool] = bool) -> None:
        self.plan = plan
        self.record = record
        self.error: TrainingError | None = None
        self._send = send
        self._any_rank = any_rank
        self._overflows = 0
        self._spikes = 0
        self._streak: list[tuple[int, Ranges]] = []

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """Judge; every rank comes to the same."""
        samples = self.record.skipped.numbers(state.samples - result.samples, state.samples)
        overflowed = result.skipped and not result.not_finite
        self._overflows = self._overflows + 1 if overflowed else 0
        # What the engine let pass, such as a norm too large for float32, has been used in an update.
        unseen = "" if result.skipped else not_finite(result.loss, result.grad_norm)
        if result.not_finite or unseen:
            self._streak = []
            policy = Policy.STOP if unseen and self.plan.nonfinite is Policy.SKIP else self.plan.nonfinite
            self._tell(engine, self._not_finite(policy, state, result.not_finite or unseen, samples))
        elif self._overflows >= self.plan.overflows:
            self.error = TrainingError(
                f"the last {self._overflows} steps overflowed in fp16 and were skipped (loss scale {result.loss_scale})",
                where=f"iteration {state.iteration}",
                fix="use bfloat16, or a lower learning rate",
            )
        elif not overflowed:
            self.record.in_a_row = 0
            self._tell(engine, self._compare(state, result.loss, samples))
        counts = {
            "skipped_nonfinite": self.record.skipped_nonfinite,
            "rollbacks": self.record.rollbacks,
            "loss_spikes": self._spikes,
        }
        known = {name: float(count) for name, count in counts.items() if count}
        if known:
            self._send({f"train/{name}": count for name, count in known.items()}, known)
        return Verdict.CONTINUE

    def after_rollback(self, state: TrainState, engine: Engine) -> None:
        """The steps of a streak are undone."""
        self._streak = []
        left_out = describe_ranges(self.record.skipped.ranges)
        self._tell(
            engine, f"went back to step {state.iteration} (rollback {self.record.rollbacks}); samples left out from now on: {left_out}"
        )

    def _tell(self, engine: Engine, line: str) -> None:
        """What all ranks have come to is said once."""
        if line and engine.groups.world.rank == 0:
            log.warning(line)

    def _not_finite(self, policy: Policy, state: TrainState, what: str, samples: Ranges) -> str:
        """Decide; gives a line for the log."""
        where = f"iteration {state.iteration}, samples {describe_ranges(samples)}"
        if policy is Policy.ROLLBACK:
            return self._go_back(f"not finite: {what}", where, state.iteration - 1, samples)
        record = self.record
        if policy is Policy.SKIP:
            record.skipped_nonfinite += 1
            record.in_a_row += 1
            if record.in_a_row <= self.plan.nonfinite_limit:
                return f"not finite: {what}, {where}: no update ({record.skipped_nonfinite} such steps so far)"
            what += f"; {record.in_a_row} steps in a row made no update (nonfinite_limit: {self.plan.nonfinite_limit})"
        self.error = DivergenceError(f"not finite: {what}", where=where, fix=_FIX)
        return ""

    def _compare(self, state: TrainState, loss: float, samples: Ranges) -> str:
        """Decide whether it is a spike, and what follows; gives a line for the log."""
        factor, record = self.plan.spike_factor, self.record
        if factor is None:
            return ""
        usual = median(loss for _, loss in record.losses) if record.losses else 0.0
        known = len(record.losses) >= min(self.plan.spike_window, ENOUGH_LOSSES)
        if not self._any_rank(known and loss > factor * usual):
            self._streak = []
            record.losses = [*record.losses, (state.iteration, loss)][-self.plan.spike_window :]
            return ""
        self._streak.append((state.iteration, samples))
        if len(self._streak) != self.plan.spike_patience:
            return ""
        self._spikes += 1
        all_samples = [pair for _, pairs in self._streak for pair in pairs]
        first = self._streak[0][0]
        what = f"loss spike: {loss:.4g} where {usual:.4g} is usual (loss_spike_factor: {factor:g})"
        where = f"iterations {first} to {state.iteration}, samples {describe_ranges(all_samples)}"
        if self.plan.spike is Policy.ROLLBACK:
            return self._go_back(what, where, first - 1, all_samples)
        if self.plan.spike is Policy.STOP:
            self.error = DivergenceError(what, where=where, fix=_FIX)
        return f"{what}, {where}"

    def _go_back(self, what: str, where: str, before: int, samples: Ranges) -> str:
        if self.record.rollbacks >= self.plan.rollback_limit:
            what += f"; the run went back {self.record.rollbacks} times already (rollback_limit: {self.plan.rollback_limit})"
            self.error = DivergenceError(what, where=where, fix=_FIX)
            return ""
        self.record.wanted = RollbackRequest(before=before, samples=Skipped().with_ranges(samples).ranges)
        return f"{what}, {where}: going back"


class ActingHook(Hook):
    """Does what a NumbersHook has found, when the step's row is written. Stands before the checkpoint, so that no such state is saved."""

    def __init__(self, numbers: NumbersHook) -> None:
        self._numbers = numbers

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """Raise the error, or answer ROLLBACK."""
        if self._numbers.error is not None:
            raise self._numbers.error
        return Verdict.CONTINUE if self._numbers.record.wanted is None else Verdict.ROLLBACK


def not_finite(loss: float, grad_norm: float | None) -> str:
    """`name = value` of the loss and the gradient norm that are not finite, joined; empty when all is well."""
    watched = {"loss": loss, "grad_norm": 0.0 if grad_norm is None else grad_norm}
    return ", ".join(f"{name} = {value}" for name, value in watched.items() if not math.isfinite(value))


def describe_ranges(ranges: Ranges) -> str:
    """Ranges of samples as text.

    >>> describe_ranges([(4, 8), (8, 12), (20, 24)])
    '[4, 12), [20, 24)'
    """
    return ", ".join(f"[{start}, {end})" for start, end in Skipped().with_ranges(ranges).ranges)
