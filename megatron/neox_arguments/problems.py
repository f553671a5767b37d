# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a configuration, and where a value came from. Knows no key."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from megatron.errors import ConfigError


@dataclass(frozen=True)
class Origin:
    """Where a value came from.

    kind: file | flag | from_dict | replace | default | derived
    file, line: set for kind file, line counted from 1
    detail: the flag for kind flag, what it was derived from for kind derived
    """

    kind: str
    file: str | None = None
    line: int | None = None
    detail: str | None = None

    def __str__(self) -> str:
        if self.kind == "file":
            return f"{self.file}:{self.line}"
        if self.kind == "flag":
            return self.detail or "command line"
        if self.kind == "derived":
            return f"derived from {self.detail}" if self.detail else "derived"
        return self.kind


DEFAULT = Origin("default")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    what:    one sentence
    where:   file:line, flag or from_dict; several joined by `, `
    allowed: what may be written instead
    closest: the nearest valid spelling, if one is near
    fix:    what the user does about it
    keys:    the keys it is about
    """

    what: str
    where: str | None = None
    allowed: str | None = None
    closest: str | None = None
    fix: str | None = None
    keys: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The problem as shown to the user, the first line being what is wrong."""
        rows = (("where", self.where), ("allowed", self.allowed), ("closest", self.closest), ("fix", self.fix))
        return [self.what, *(f"  {name + ':':<9}{text}" for name, text in rows if text)]


class ConfigProblems(ConfigError):
    """All problems of one configuration in one error.

    `what` names the first problem (or how many there are); `problems` holds them all; `report()` shows them all.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        first = self.problems[0]
        what = first.what if len(self.problems) == 1 else f"{len(self.problems)} problems in the configuration"
        super().__init__(what, where=first.where, fix=first.fix)

    def report(self) -> str:
        """Every problem with what, where, allowed, closest and fix."""
        if len(self.problems) == 1:
            return "\n".join(self.problems[0].lines())
        parts = [f"{len(self.problems)} problems in the configuration:"]
        for number, problem in enumerate(self.problems, start=1):
            first, *rest = problem.lines()
            parts += [f"{number}. {first}", *(f"  {line}" for line in rest)]
        return "\n".join(parts)


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name nearest to `name`, whatever its case; None when nothing is near."""
    by_fold = {other.lower(): other for other in known}
    found = get_close_matches(name.lower(), by_fold, n=1, cutoff=0.6)
    return by_fold[found[0]] if found else None


def shown(value: Any) -> str:
    """A value as in YAML flow style, shortened for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value) if isinstance(value, str | int | float | list | dict) else f"{type(value).__name__} object"
    return text if len(text) <= 80 else text[:77] + "..."


def plain(number: float) -> str:
    """A number without a needless fraction or exponent: 2.0 -> 2, 0.001 -> 0.001."""
    return str(int(number)) if float(number).is_integer() and abs(number) < 1e15 else f"{number:g}"
