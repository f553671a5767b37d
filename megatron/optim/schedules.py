# SPDX-License-Identifier: Apache-2.0
"""Learning rate as a pure function of the step, and the thin object through which DeepSpeed drives it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from types import MappingProxyType
from typing import Any, Protocol

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
    return max(spec.min_lr, _LAWS[spec.decay_style](step, spec))


def _progress(step: int, spec: ScheduleSpec) -> float:
    """Steps after warm-up, as a share of the steps from there to end_iter."""
    return (step - spec.warmup_iter) / max(spec.end_iter - spec.warmup_iter, 1.0)


def _constant(step: int, spec: ScheduleSpec) -> float:
    return spec.start_lr


def _linear(step: int, spec: ScheduleSpec) -> float:
    return spec.min_lr + (spec.start_lr - spec.min_lr) * (1.0 - min(1.0, _progress(step, spec)))


def _cosine(step: int, spec: ScheduleSpec) -> float:
    """Half a cosine (Loshchilov & Hutter, arXiv 1608.03983, eq. 5, one period), then min_lr."""
    return spec.min_lr + (spec.start_lr - spec.min_lr) / 2.0 * (1.0 + math.cos(math.pi * min(1.0, _progress(step, spec))))


def _exponential(step: int, spec: ScheduleSpec) -> float:
    # FORMAT: 0.693, not ln 2, so that a resumed run goes on at the recorded rates.
    return spec.start_lr * math.exp(-0.693 * _progress(step, spec))


def _wsd(step: int, spec: ScheduleSpec) -> float:
    """Warm-up, stable, decay (Hu et al., arXiv 2404.06395, sec. 4.2) with a linear decay (Haegele et al., arXiv 2405.18392)."""
    length = spec.wsd_decay_fraction * spec.end_iter
    start = max(spec.end_iter - length, spec.warmup_iter)
    if step <= start:
        return spec.start_lr
    left = (spec.end_iter - step) / (spec.end_iter - start) if step < spec.end_iter else 0.0
    return spec.min_lr + (spec.start_lr - spec.min_lr) * left


def _inverse_sqrt(step: int, spec: ScheduleSpec) -> float:
    """Falls with 1 / sqrt(step) from the end of warm-up on (Vaswani et al., arXiv 1706.03762, eq. 3)."""
    warmup = max(spec.warmup_iter, 1.0)
    return spec.start_lr * math.sqrt(warmup / max(step, warmup))


_LAWS: Mapping[Decay, Callable[[int, ScheduleSpec], float]] = MappingProxyType(
    {
        Decay.CONSTANT: _constant,
        Decay.LINEAR: _linear,
        Decay.COSINE: _cosine,
        Decay.EXPONENTIAL: _exponential,
        Decay.WSD: _wsd,
        Decay.INVERSE_SQRT: _inverse_sqrt,
    }
)


class _HasGroups(Protocol):
    """What the scheduler needs of an optimizer."""

    param_groups: list[dict[str, Any]]


class LRScheduler:
    """Writes lr_at(number of steps done), times a group's `lr_mult`, into every group of an optimizer.

    optimizer: the one whose `param_groups` the engine steps (the innermost)
    on_resume: what `load_state_dict` does with another schedule than the configured one
    """

    def __init__(self, optimizer: _HasGroups, spec: ScheduleSpec, *, on_resume: OnResume = OnResume.COMPARE) -> None:
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
            configuration's is, and the difference told, as nothing else of that optimizer goes on.
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
        state = _plain(self.spec)
        return {**state, "num_iters": self.num_iters}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was saved.

        Raises ConfigError naming every value that differs, unless `on_resume` says which side wins.
        """
        saved = spec_from_state(state, self.spec)
        if self.on_resume is OnResume.COMPARE:
            _refuse_change(_plain(saved), _plain(self.spec))
        self._choose(saved)
        self.num_iters = int(state["num_iters"])
        self.apply()

    def _choose(self, saved: ScheduleSpec) -> None:
        """Follow the schedule that `on_resume` says, and tell what differs."""
        changed = _changed(_plain(saved), _plain(self.spec))
        if changed:
            which = "checkpoint" if self.on_resume is OnResume.SAVED else "configuration"
            lines = [f"  {_KEYS[name]}: {old} in the checkpoint, {new} in the configuration" for name, old, new in changed]
            log.warning("the learning rate follows the schedule of the %s:\n%s", which, "\n".join(lines))
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
        "min_lr": "min_lr",
        "wsd_decay_fraction": "wsd_decay_fraction",
        "warmup_from_zero": "warmup_from_zero",
    }
)


def _changed(saved: Mapping[str, Any], configured: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, saved, configured) of each difference between two schedules."""
    names = [name for name in _KEYS if name in saved or name in configured]
    return [(name, saved.get(name), configured.get(name)) for name in names if not _same(saved.get(name), configured.get(name))]


def _refuse_change(saved: Mapping[str, Any], configured: Mapping[str, Any]) -> None:
    """Raise when two schedules differ, naming key, saved and configured value of each difference."""
    changed = _changed(saved, configured)
    if not changed:
        return
    lines = [f"{_KEYS[name]}: {old} in the checkpoint, {new} in the configuration" for name, old, new in changed]
    raise ConfigError(
        "the learning-rate schedule changed since the checkpoint was saved: " + "; ".join(lines),
        where=", ".join(_KEYS[name] for name, _, _ in changed),
        fix="set override_lr_scheduler: true to go on with the configuration's schedule, "
        "use_checkpoint_lr_scheduler: true to go on with the checkpoint's, or restore the old values",
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=0.0)
    return bool(a == b)
