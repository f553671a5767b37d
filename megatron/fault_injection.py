# SPDX-License-Identifier: Apache-2.0
"""Faults made on purpose, for the tests of everything that must survive them. Without a plan every function here does nothing.

NEOX_FAULTS names a YAML file with a list of rows:

    - {site: write, rank: 1, step: 10, action: kill}
    - {site: loss, step: 3, action: nan, times: 3}

site:   where; the names are given by the callers of `point` and `changed`
rank:   on which rank; left out = on every one
step:   in which optimizer step, counted from 1; left out = in any
skip:   how many passes let through before (default 0)
times:  how often (default 1)
action: kill (SIGKILL), exit, segfault, raise (RuntimeError), disk (OSError: no space left), sleep, signal;
        for `changed`: nan, inf, scale; flip (one bit of a CPU tensor's first element)
value:  exit status, seconds, name of the signal, factor, or number of the bit
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megatron.errors import ConfigError

PLAN = "NEOX_FAULTS"

T = TypeVar("T")


@dataclass(kw_only=True)
class _Fault:
    site: str
    action: str
    rank: int | None = None
    step: int | None = None
    skip: int = 0
    times: int = 1
    value: Any = None

    def due(self, site: str, step: int) -> bool:
        """Whether it happens at this pass; counts the pass."""
        if site != self.site or self.times < 1 or self.step not in (None, step):
            return False
        if self.rank not in (None, int(os.environ.get("RANK", "0"))):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return True


def _raise(value: Any) -> None:
    raise RuntimeError(str(value or "made on purpose"))


def _disk(value: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


_ACTIONS: dict[str, Callable[[Any], object]] = {
    "kill": lambda value: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda value: os._exit(int(value or 1)),
    "segfault": lambda value: ctypes.string_at(0),
    "raise": _raise,
    "disk": _disk,
    "sleep": lambda value: time.sleep(float(value)),
    "signal": lambda value: os.kill(os.getpid(), signal.Signals[str(value)]),
}


def _flip(subject: Any, value: Any) -> Any:
    changed = subject.detach().clone()
    # Whole bytes, whatever the type of the elements is.
    octets = (ctypes.c_uint8 * changed.element_size()).from_address(changed.data_ptr())
    octets[int(value or 0) // 8] ^= 1 << int(value or 0) % 8
    return changed


_CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "nan": lambda subject, value: subject * float("nan"),
    "inf": lambda subject, value: subject * 0 + float("inf"),
    "scale": lambda subject, value: subject * float(value),
    "flip": _flip,
}


@dataclass
class _Plan:
    """The rows of a plan, and the step that is under way."""

    faults: list[_Fault]
    step: int = 0

    def due(self, site: str, actions: Collection[str]) -> Iterator[_Fault]:
        """The faults of these actions that happen at this pass."""
        return (fault for fault in self.faults if fault.action in actions and fault.due(site, self.step))


def _read(path: str) -> _Plan:
    rows = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    try:
        faults = [_Fault(**row) for row in rows]
    except TypeError as error:
        raise ConfigError(f"not a list of faults: {error}", where=path, fix=f"correct it, or unset {PLAN}") from error
    odd = {fault.action for fault in faults} - set(_ACTIONS) - set(_CHANGES)
    if odd:
        raise ConfigError(f"unknown actions {sorted(odd)}", where=path, fix=f"use one of {sorted({*_ACTIONS, *_CHANGES})}")
    return _Plan(faults)


@functools.cache
def _plan() -> _Plan:
    """The plan that the environment names; read when the first place is passed."""
    path = os.environ.get(PLAN)
    return _read(path) if path else _Plan([])


def planned() -> bool:
    """Whether there is a plan at all."""
    return bool(os.environ.get(PLAN))


def begin_step(number: int) -> None:
    """Optimizer step `number`, counted from 1, begins."""
    _plan().step = number


def point(site: str) -> None:
    """A place where the process may be made to fail."""
    for fault in _plan().due(site, _ACTIONS):
        _ACTIONS[fault.action](fault.value)


def changed(site: str, subject: T) -> T:
    """`subject` (a number or tensor), made not finite or scaled where the plan says so."""
    for fault in _plan().due(site, _CHANGES):
        subject = _CHANGES[fault.action](subject, fault.value)
    return subject
