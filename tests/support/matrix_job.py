# SPDX-License-Identifier: Apache-2.0
"""What goes to a server of jobs and what comes back when one fails. Both can be pickled; neither knows what is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Job(NamedTuple):
    """A call of `function(task, rank)` in `world` processes."""

    function: Callable[[Any, int], Any]
    task: Any
    world: int
    timeout_s: float


@dataclass(frozen=True)
class Failure:
    """What went wrong, with the traceback or the end of the logs."""

    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason}\n{self.detail}".rstrip()
