# SPDX-License-Identifier: Apache-2.0
"""A configuration while it is being resolved: values, where they came from, and what is wrong so far. Knows no key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .problems import Origin, Problem, shown


@dataclass
class ResolutionState:
    """Values of all keys on their way to the frozen sections.

    values:  key -> value, defaults filled in
    given:   keys that the user set to something other than null
    origins: key or dotted path -> where the user set it
    files:   names of the config files, to place what is missing
    bad:     keys and dotted paths already known to be wrong; later findings about them are only noise
    sources: derived key -> what it was derived from
    """

    values: dict[str, Any]
    given: frozenset[str]
    origins: Mapping[str, Origin]
    files: tuple[str, ...] = ()
    bad: set[str] = field(default_factory=set)
    sources: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def derive(self, key: str, value: Any, source: str) -> None:
        """Set a key to what follows from others; a key the user gave keeps its origin even where its value is completed."""
        if key not in self.given:
            self.sources[key] = source
        self.values[key] = value

    def refuse(self, problem: Problem, *, spoils: bool = True) -> None:
        """Note a problem, in its place, unless it follows from one already noted.

        spoils: whether what is found later about the same keys is taken to follow from this problem
        """
        if not self.bad.intersection(problem.keys):
            self.problems.append(problem if problem.where else replace(problem, where=self.place(problem.keys)))
            if spoils:
                self.bad.update(problem.keys)

    def place(self, keys: tuple[str, ...]) -> str | None:
        """The places where `keys` are set, or the files where one could be."""
        # A derived key has no place of its own: what it was derived from has.
        sought = [(key, *self.sources.get(key, "").split(", ")) for key in keys]
        found = [str(self.origins[path]) for names in sought for path in [next(filter(None, map(self._set_path, names)), None)] if path]
        return ", ".join(dict.fromkeys(found)) or ", ".join(self.files) or None

    def _set_path(self, key: str) -> str | None:
        """`key`, or the nearest block around it, as far as the user set one."""
        while key not in self.origins:
            key, dot, _ = key.rpartition(".")
            if not dot:
                return None
        return key

    def agree(self, key: str, path: str, inner: Any) -> Any:
        """The common value of a key and of its twin inside a block (`path`); refused when both are set and differ."""
        if key not in self.given:
            return inner
        outer = self.values[key]
        if inner is None or inner == outer:
            return outer
        self.refuse(
            Problem(
                f"{key} is {shown(outer)}, but {path} is {shown(inner)}",
                fix=f"set one of the two; {path} is enough" if "." in path else "set one of the two, or both alike",
                keys=(key, path),
            )
        )
        return inner
