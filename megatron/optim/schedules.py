# SPDX-License-Identifier: Apache-2.0
"""Learning rate as a pure function of the step, and the thin object through which DeepSpeed drives it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from types import MappingProxyType
from typing import Any

from torch.optim import Optimizer

from megatron.errors import ConfigError
from megatron.log import get_logger
from megatron.optim.groups import rate_of

log = get_logger(__name__)


class Decay(str, Enum):
    """Law of the learning rate after warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"
    EXPONENTIAL = "exponential"
    WSD = "wsd"
    INVERSE_SQRT = "inverse_sqrt"


class OnResume(Enum):
    """What a checkpoint's schedule means to a resumed run."""

    COMPARE = "must equal the configuration"
    CONFIGURED = "is replaced by the configuration"
    SAVED = "replaces the configuration"


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """A schedule. The field names are those of a checkpoint.

    start_lr:     highest rate, reached at the end of warm-up
    warmup_iter:  steps of warm-up; may be a fraction
    end_iter:     step at which the decay ends
    min_lr:       lowest rate after warm-up
    wsd_decay_fraction: share of end_iter over which `wsd` decays
    warmup_from_zero: step 0 runs at a rate of 0
    """

    start_lr: float
    decay_style: Decay
    end_iter: int
    warmup_iter: float = 0.0
    min_lr: float = 0.0
    wsd_decay_fraction: float = 0.1
    warmup_from_zero: bool = False


def lr_at(step: int, spec: ScheduleSpec) -> float:
    """The learning rate used in step `step`, counted from 0.

    Warm-up is start_lr * max(1, step) / warmup_iter: the first two steps share a rate, so that none is spent at 0
    (unless warmup_from_zero).
    """
    # FORMAT: the step at which warm-up ends belongs to it, and step 0 counts as 1, as in recorded runs.
    if spec.warmup_iter > 0 and step <= spec.warmup_iter:
        return spec.start_lr * min(1.0, max(0 if spec.warmup_from_zero else 1, step) / spec.warmup_iter)
    return max(spec.min_lr, _decayed(step, spec))


def _decayed(step: int, spec: ScheduleSpec) -> float:
    """The rate after warm-up. Laws: cosine: Loshchilov & Hutter, arXiv 1608.03983, eq. 5, half a period; inverse_sqrt: Vaswani et al.,
    arXiv 1706.03762, eq. 3; wsd: Hu et al., arXiv 2404.06395, sec. 4.2, with the linear decay of Haegele et al., arXiv 2405.18392.
    """
    law, span = spec.decay_style, spec.start_lr - spec.min_lr
    progress = (step - spec.warmup_iter) / max(spec.end_iter - spec.warmup_iter, 1.0)
    if law is Decay.LINEAR:
        return spec.min_lr + span * (1.0 - min(1.0, progress))
    if law is Decay.COSINE:
        return spec.min_lr + span / 2.0 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    if law is Decay.EXPONENTIAL:
        # FORMAT: 0.693, not ln 2, so that a resumed run goes on at the recorded rates.
        return spec.start_lr * math.exp(-0.693 * progress)
    if law is Decay.INVERSE_SQRT:
        warmup = max(spec.warmup_iter, 1.0)
        return spec.start_lr * math.sqrt(warmup / max(step, warmup))
    start = max(spec.end_iter - spec.wsd_decay_fraction * spec.end_iter, spec.warmup_iter)
    if law is Decay.CONSTANT or step <= start:
        return spec.start_lr
    left = (spec.end_iter - step) / (spec.end_iter - start) if step < spec.end_iter else 0.0
    return spec.min_lr + span * left


class LRScheduler:
    """Writes lr_at(number of steps done), times a group's `lr_mult`, into every group of an optimizer.

    optimizer: the one whose `param_groups` the engine steps (the innermost)
    on_resume: what `load_state_dict` does with another schedule than the configured one
    """

    def __init__(self, optimizer: Optimizer, spec: ScheduleSpec, *, on_resume: OnResume = OnResume.COMPARE) -> None:
        self.optimizer = optimizer
        self.spec = spec
        self.on_resume = on_resume
        self.num_iters = 0
        self.apply()

    def apply(self) -> None:
        """Write the current rate again; needed after the optimizer's own state was loaded."""
        rate = lr_at(self.num_iters, self.spec)
        for group in self.optimizer.param_groups:
            group["lr"] = rate_of(group, rate)

    def step(self) -> None:
        """One optimizer step was made."""
        self.num_iters += 1
        self.apply()

    def seek(self, steps: int, saved: Mapping[str, Any] | None = None) -> None:
        """Go to where `steps` optimizer steps have been made.

        saved: the checkpoint's schedule, where the optimizer begins anew. It is followed if `on_resume` says so; else the
            configuration's is, and the difference is logged, as nothing else of that optimizer goes on.
        """
        if saved:
            self._choose(spec_from_state(saved, self.spec))
        self.num_iters = steps
        self.apply()

    def get_lr(self) -> list[float]:
        """The rate of each group for the coming step."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[float]:
        """The same as `get_lr`; the name torch schedulers use."""
        return self.get_lr()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {**_plain(self.spec), "num_iters": self.num_iters}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was saved.

        Raises ConfigError naming every value that differs, unless `on_resume` says which side wins.
        """
        saved = spec_from_state(state, self.spec)
        changed = _differences(saved, self.spec)
        if changed and self.on_resume is OnResume.COMPARE:
            raise ConfigError(
                "the learning-rate schedule changed since the checkpoint was saved: " + "; ".join(changed.values()),
                where=", ".join(changed),
                fix="set override_lr_scheduler: true to go on with the configuration's schedule, "
                "use_checkpoint_lr_scheduler: true to go on with the checkpoint's, or restore the old values",
            )
        self._choose(saved)
        self.num_iters = int(state["num_iters"])
        self.apply()

    def _choose(self, saved: ScheduleSpec) -> None:
        """Follow the schedule that `on_resume` says, and tell what differs."""
        changed = _differences(saved, self.spec)
        if changed:
            which = "checkpoint" if self.on_resume is OnResume.SAVED else "configuration"
            lines = "\n".join(f"  {line}" for line in changed.values())
            log.warning("the learning rate follows the schedule of the %s:\n%s", which, lines)
        if self.on_resume is OnResume.SAVED:
            self.spec = saved


def spec_from_state(state: Mapping[str, Any], default: ScheduleSpec) -> ScheduleSpec:
    """The schedule a checkpoint was trained with; what it does not say is taken from `default`."""
    values = {f.name: state.get(f.name, getattr(default, f.name)) for f in fields(ScheduleSpec)}
    return ScheduleSpec(**{**values, "decay_style": Decay(str(getattr(values["decay_style"], "value", values["decay_style"])).lower())})


def _plain(spec: ScheduleSpec) -> dict[str, Any]:
    """Field name -> plain value; the two fields of ours only where they mean something."""
    # FORMAT: exactly the reference's keys for the schedules it knows.
    ours = {"wsd_decay_fraction": spec.decay_style is Decay.WSD, "warmup_from_zero": spec.warmup_from_zero}
    state = {f.name: getattr(spec, f.name) for f in fields(spec) if ours.get(f.name, True)}
    return {**state, "decay_style": spec.decay_style.value}


_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "start_lr": "optimizer.params.lr",
        "decay_style": "lr_decay_style",
        "end_iter": "lr_decay_iters / train_iters",
        "warmup_iter": "warmup (steps)",
    }
)
"""Configuration keys of the fields that are not named as theirs."""


def _differences(saved: ScheduleSpec, configured: ScheduleSpec) -> dict[str, str]:
    """Configuration key -> a line with both values, for each difference between two schedules."""
    old, new = _plain(saved), _plain(configured)
    both = ((_KEYS.get(f.name, f.name), old.get(f.name), new.get(f.name)) for f in fields(ScheduleSpec))
    return {key: f"{key}: {a} in the checkpoint, {b} in the configuration" for key, a, b in both if not _same(a, b)}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=0.0)
    return bool(a == b)
