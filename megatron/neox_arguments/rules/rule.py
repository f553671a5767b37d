# SPDX-License-Identifier: Apache-2.0
"""The form of a rule about several keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..problems import Problem

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """A relation between keys.

    needs: keys that must be set and right by themselves before the rule says anything
    check: resolved values -> the problems found
    """

    name: str
    needs: tuple[str, ...]
    check: Callable[[Values], Iterable[Problem]]


def simple(
    name: str,
    needs: tuple[str, ...],
    broken: Callable[[Values], bool],
    what: str | Callable[[Values], str],
    fix: str,
    about: tuple[str, ...] = (),
) -> Rule:
    """A rule with one outcome. `what` and `fix` may use the values: "{hidden_size} features".

    about: the keys it is about, `needs` unless given
    """

    def check(v: Values) -> Iterable[Problem]:
        if broken(v):
            text = what(v) if callable(what) else what.format_map(v)
            yield Problem(text, fix=fix.format_map(v), keys=about or needs)

    return Rule(name, needs, check)


def divides(name: str, part: str, whole: str, when: Callable[[Values], bool] = lambda v: True) -> Rule:
    """`whole` must be a multiple of `part`."""

    def check(v: Values) -> Iterable[Problem]:
        size, count = v[whole], v[part]
        if when(v) and size % count:
            fitting = [n for n in range(1, min(size, 4096) + 1) if size % n == 0]
            near = sorted(sorted(fitting, key=lambda n: (abs(n - count), n))[:4])
            yield Problem(
                f"{part} {count} does not divide {whole} {size}",
                allowed=f"{part} that divides {size}, such as {', '.join(map(str, near))}",
                fix=f"set {part} to {min(near, key=lambda n: abs(n - count))}, or {whole} to a multiple of {count}",
                keys=(part, whole),
            )

    return Rule(name, (part, whole), check)
