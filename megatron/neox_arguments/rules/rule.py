# SPDX-License-Identifier: Apache-2.0
"""The form of a rule about several keys, and the kinds of rules that are common.

Keys are given as one text, separated by spaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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

    needs: str
    check: Callable[[Values], Iterable[Problem]]

    def broken(self, values: Values, bad: set[str]) -> Iterator[Problem]:
        """The problems found; none while one of `needs` is among the `bad` keys, or not set."""
        needs = self.needs.split()
        if bad.isdisjoint(needs) and all(values[key] is not None for key in needs):
            yield from self.check(values)


def simple(
    needs: str,
    broken: Callable[[Values], bool],
    what: str | Callable[[Values], str],
    fix: str,
    about: str = "",
    *,
    allowed: str | None = None,
) -> Rule:
    """A rule with one outcome. `what` and `fix` may use the values: "{hidden_size} features".

    about: the keys it is about, `needs` unless given
    """

    def check(v: Values) -> Iterable[Problem]:
        if broken(v):
            text = what(v) if callable(what) else what.format_map(v)
            yield Problem(text, fix=fix.format_map(v), allowed=allowed, keys=tuple((about or needs).split()))

    return Rule(needs, check)


def lacks(key: str, other: str, what: str, fix: str) -> Rule:
    """A key is in use without another one, which must be set for it: `what`, "but OTHER is not set"."""
    return simple(key, lambda v: v[key] is not False and v[other] is None, f"{what}, but {other} is not set", fix, f"{key} {other}")


def divides(part: str, whole: str, when: Callable[[Values], bool] = lambda v: True) -> Rule:
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

    return Rule(f"{part} {whole}", check)


def zero_stage(v: Values) -> int:
    """The stage of the zero_optimization block; 0 where it is none, or the autotuner's to choose."""
    stage = (v["zero_optimization"] or {}).get("stage")
    return stage if isinstance(stage, int) else 0
