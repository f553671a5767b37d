# SPDX-License-Identifier: Apache-2.0
"""Runs cells of the compatibility matrix and judges them against one process. Imports no torch; writes no document."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from support.dist import DistributedFailure, run_distributed
from support.forkserver import serving
from support.matrix_cells import STEPS, Cell, refusal
from support.matrix_rank import Outcome, Task, run_rank

WORKS, REFUSED, FAILED = "works", "refused", "failed"
TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Band:
    """How far a cell may be from one process.

    loss:  relative, of every step's loss and of the evaluation after them
    norm:  relative, of every step's gradient norm
    first: relative, of the first step's gradient norm, when weights are still the same
    drift: see Outcome
    """

    loss: float
    norm: float
    first: float
    drift: float


BANDS = {
    "fp32": Band(loss=1e-6, norm=1e-5, first=1e-5, drift=1e-5),
    # Measured, at most: 8e-4, 1.6e-2, 1.4e-3, 2.8e-2. One process in bf16 is 6e-4, 1e-2, 1.3e-3 from one in fp32.
    # A sum over tensor ranks left out in the backward pass makes a norm 1.3e-1 and the drift 5e-1 and more.
    "bf16": Band(loss=2e-3, norm=2e-2, first=3e-3, drift=5e-2),
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a cell.

    state:  WORKS, REFUSED or FAILED
    reason: why it was refused, or how it failed
    loss, norm, first, drift: as in Band
    """

    cell: Cell
    state: str
    reason: str = ""
    loss: float = 0.0
    norm: float = 0.0
    first: float = 0.0
    drift: float = 0.0
    seconds: float = 0.0

    def __str__(self) -> str:
        numbers = f"loss {self.loss:.1e} norm {self.norm:.1e} drift {self.drift:.1e} {self.seconds:.1f} s"
        return f"{self.state:7} {self.cell}: {numbers if self.state == WORKS else self.reason}"


def relative(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest difference, relative to b; infinite where a number is not finite."""
    found = [abs(x - y) / abs(y) if y else abs(x) for x, y in zip(a, b, strict=True)]
    return max(found) if all(map(math.isfinite, found)) else math.inf


def some(names: Sequence[str], most: int = 4) -> str:
    """The first of many names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def judge(cell: Cell, outcome: Outcome | DistributedFailure, reference: Outcome | DistributedFailure) -> Result:
    """Compare what a cell's rank 0 saw with what one process saw."""
    if isinstance(reference, DistributedFailure):
        return Result(cell=cell, state=FAILED, reason=f"there is no reference: {reference}")
    if isinstance(outcome, DistributedFailure):
        return Result(cell=cell, state=FAILED, reason=str(outcome))
    alike = len(outcome.norms) == len(reference.norms)
    faults = []
    if not alike:
        faults.append(f"{len(outcome.norms)} of {len(reference.norms)} steps told a gradient norm")
    if outcome.initial != reference.initial:
        names = [
            name for name in sorted({*outcome.initial, *reference.initial}) if outcome.initial.get(name) != reference.initial.get(name)
        ]
        faults.append(f"other initial weights: {some(names)}")
    if outcome.unequal:
        faults.append(f"ranks hold different copies of {some(outcome.unequal)}")
    found = Band(
        loss=relative((*outcome.losses, outcome.evaluation), (*reference.losses, reference.evaluation)),
        norm=relative(outcome.norms, reference.norms) if alike else math.inf,
        first=relative(outcome.norms[:1], reference.norms[:1]) if alike else math.inf,
        drift=outcome.drift,
    )
    for name, limit in vars(BANDS[cell.precision]).items():
        if not getattr(found, name) <= limit:
            faults.append(f"{name} is off by {getattr(found, name):.2e}, more than {limit:g}")
    state = FAILED if faults else WORKS
    return Result(cell=cell, state=state, reason="; ".join(faults), seconds=outcome.seconds, **vars(found))


def run_cells(
    cells: Sequence[Cell],
    *,
    jobs: int = 2,
    timeout_s: float = TIMEOUT_S,
    told: Callable[[Result], None] = lambda result: None,
    faults: dict[Cell, str] | None = None,
) -> list[Result]:
    """Refuse or run every cell; results in the cells' order.

    jobs:   cells at a time
    told:   called with each result as it comes
    faults: see support.matrix_rank.FAULTS
    """
    results: dict[Cell, Result] = {}

    def tell(cell: Cell, result: Result) -> None:
        results[cell] = result
        told(result)

    for cell in cells:
        if (reason := refusal(cell)) is not None:
            tell(cell, Result(cell=cell, state=REFUSED, reason=reason))
    runnable = [cell for cell in cells if cell not in results]
    with tempfile.TemporaryDirectory(prefix="matrix-data-") as folder, serving(), ThreadPoolExecutor(jobs) as pool:
        run = partial(_run, folder=Path(folder), timeout_s=timeout_s)
        references = sorted({cell.reference for cell in runnable})
        # The first one alone: it indexes the data, which the others find.
        answers = {cell: run(cell, alone=True) for cell in references[:1]}
        answers |= zip(references[1:], pool.map(partial(run, alone=True), references[1:]), strict=True)
        asked = {pool.submit(run, cell, fault=(faults or {}).get(cell)): cell for cell in runnable}
        for done in as_completed(asked):
            cell = asked[done]
            tell(cell, judge(cell, done.result(), answers[cell.reference]))
    return [results[cell] for cell in cells]


def _run(cell: Cell, *, folder: Path, timeout_s: float, alone: bool = False, fault: str | None = None) -> Outcome | DistributedFailure:
    """What rank 0 of a cell saw, or how it failed. alone: in one process, whose weights are kept."""
    task = Task(
        flat=cell.flat(alone=alone, index_map_dir=str(folder)),
        steps=STEPS,
        weights=str(folder / f"{cell.style}-{cell.precision}.npz"),
        is_reference=alone,
        fault=fault,
    )
    try:
        outcome: Outcome = run_distributed(run_rank, 1 if alone else cell.world, timeout_s, init=False, task=task)[0]
    except DistributedFailure as failure:
        return failure
    return outcome
