# SPDX-License-Identifier: Apache-2.0
"""Rules: which keys do not go together. All of them in one list, and what of them a state breaks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Protocol

from ..problems import Problem
from .data import DATA_RULES
from .model import MODEL_RULES
from .optimizers import OPTIMIZER_RULES, REPORT_RULES
from .parallel import PARALLEL_RULES
from .rule import Rule
from .run import RUN_RULES

RULES: Final[tuple[Rule, ...]] = (*MODEL_RULES, *PARALLEL_RULES, *RUN_RULES, *OPTIMIZER_RULES, *DATA_RULES, *REPORT_RULES)


class Findings(Protocol):
    """What rules need of a state: values, and which keys are known to be wrong."""

    values: dict[str, Any]
    bad: set[str]


def broken_rules(state: Findings) -> Iterator[Problem]:
    """What every rule finds; a rule waits until the keys it needs are right by themselves."""
    for rule in RULES:
        if state.bad.isdisjoint(rule.needs) and all(state.values[key] is not None for key in rule.needs):
            yield from rule.check(state.values)
