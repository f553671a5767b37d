# SPDX-License-Identifier: Apache-2.0
"""The compatibility matrix as a page of Markdown. Runs nothing."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Sequence
from importlib.metadata import version

from support.matrix_cells import AXES, MOST_RANKS, STEPS, Cell, all_cells
from support.matrix_run import BANDS, FAILED, REFUSED, WORKS, Result

STYLE_NAMES = {
    "neox": "GPT-NeoX (rotary positions, parallel residual, biases)",
    "gpt2": "GPT-2 (learned positions, tied embeddings)",
    "llama": "LLaMA (RMSNorm, SwiGLU, grouped key/value heads)",
}
INTRODUCTION = """\
# Compatibility

Which parallel sizes, ZeRO stages, precisions and kinds of activation checkpointing go together. Written by
`python tests/matrix.py --write`; do not edit.

Every combination is either **refused** before anything starts, with a reason, or **works**: a tiny model trained for
{steps} steps on uneven loss masks is compared with one process without ZeRO and without recomputation. What must hold:

- the initial weights, gathered from all ranks, are those of one process in every bit;
- the loss of every step and of one evaluation after the last, the gradient norm of every step, and the weights after the
  last step are within the band below; ranks that hold copies of a weight hold the same bits;
- no job takes longer than its time limit.

| precision | loss (relative) | gradient norm (relative) | of the first step | weights (distance / way from the start) |
|---|---|---|---|---|
{bands}

The bfloat16 band is what rounding does: another layout adds the same numbers in another order, and results are rounded to
8 bits. One process in bfloat16 is as far from one process in float32 (loss 6e-4, norm 1e-2). A fault of the sharding (a sum
over ranks left out, a gradient halved) is far outside: `tests/test_matrix.py` makes such faults and sees them.

{totals}
A row is a layout: tensor ranks (`model_parallel_size`; + seq: `sequence_parallel`), context ranks
(`context_parallel_size`) and stages (`pipe_parallel_size`; 0 is the plain engine). A field holds the largest differences
from one process, loss / gradient norm, over all kinds of activation checkpointing ({kinds}). Where a job needs at most
{half} processes for one copy of the model, it has two copies, which share the data and are what ZeRO spreads over.
A number in brackets is a reason below: alone, all of it is refused; beside figures, the kind of checkpointing that it names.
"""


def document(results: Sequence[Result]) -> str:
    """The whole page."""
    bands = "\n".join(
        f"| {name} | {band.loss:.0e} | {band.norm:.0e} | {band.first:.0e} | {band.drift:.0e} |" for name, band in BANDS.items()
    )
    kinds = ", ".join(AXES["recompute"])
    parts = [INTRODUCTION.format(steps=STEPS, half=MOST_RANKS // 2, bands=bands, totals=totals(results), kinds=kinds)]
    notes = Notes(results)
    for style in AXES["style"]:
        for precision in AXES["precision"]:
            own = [result for result in results if (result.cell.style, result.cell.precision) == (style, precision)]
            parts.append(f"## {STYLE_NAMES[style]}, {precision}\n\n{table(own, notes)}\n")
    parts.append(refusals(results))
    if failures := [result for result in results if result.state == FAILED]:
        parts.append("## Failures\n\n" + "\n".join(f"- `{result.cell}`: {result.reason.splitlines()[0]}" for result in failures) + "\n")
    return "\n".join(parts)


def totals(results: Sequence[Result]) -> str:
    """How many cells there are and what became of them; with date and versions."""
    count = {state: sum(result.state == state for result in results) for state in (WORKS, REFUSED, FAILED)}
    every = all_cells()
    twins = sum(cell.job != cell for cell in every)
    what = f"{len(every)} combinations of " + ", ".join(f"{name} ({len(values)})" for name, values in AXES.items())
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    return (
        f"{what}: {count[WORKS]} work, {count[REFUSED]} are refused, {count[FAILED]} fail.\n"
        f"The other {twins} are the same job as one of these: `sequence_parallel` has no effect with `model_parallel_size: 1`.\n\n"
        f"{datetime.date.today().isoformat()}, {versions}, CPU (gloo).\n"
    )


class Notes:
    """Numbers of the reasons, in the order of the cells."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._numbers: dict[str, int] = {}
        for result in results:
            for reason in reasons(result):
                self._numbers.setdefault(reason, len(self._numbers) + 1)

    def of(self, results: Iterable[Result]) -> str:
        """References to the reasons of those of `results` that are refused."""
        numbers = sorted({self._numbers[reason] for result in results for reason in reasons(result)})
        return "".join(f"[{number}]" for number in numbers)

    def items(self) -> Iterable[tuple[int, str]]:
        """(number, reason)."""
        return ((number, reason) for reason, number in self._numbers.items())


def reasons(result: Result) -> list[str]:
    """Why a cell is refused; nothing where it is not."""
    return result.reason.splitlines() if result.state == REFUSED else []


def layout_of(cell: Cell) -> tuple[int, int, int, int]:
    """What a row is about."""
    return (cell.tp, cell.sp, cell.cp, cell.pp)


def table(results: Sequence[Result], notes: Notes) -> str:
    """One style and precision: layouts by ZeRO stage."""
    lines = [
        "| tensor | context | stages | " + " | ".join(f"ZeRO {stage}" for stage in AXES["zero"]) + " |",
        "|---|---|---|" + "---|" * len(AXES["zero"]),
    ]
    for layout in sorted({layout_of(result.cell) for result in results}):
        tp, sp, cp, pp = layout
        row = [result for result in results if layout_of(result.cell) == layout]
        fields = [field([result for result in row if result.cell.zero == stage], notes) for stage in AXES["zero"]]
        lines.append(f"| {tp}{' + seq' if sp else ''} | {cp} | {pp} | " + " | ".join(fields) + " |")
    return "\n".join(lines)


def field(results: Sequence[Result], notes: Notes) -> str:
    """One layout and stage, over all kinds of recomputation."""
    good = [result for result in results if result.state == WORKS]
    bad = [result for result in results if result.state == FAILED]
    parts = []
    if bad:
        parts.append(f"**fails** ({', '.join(result.cell.recompute for result in bad)})")
    if good:
        parts.append(f"{digits(max(result.loss for result in good))} / {digits(max(result.norm for result in good))}")
    parts.append(notes.of(results))
    return " ".join(part for part in parts if part)


def digits(number: float) -> str:
    """One digit, rounded up."""
    if number == 0:
        return "0"
    exponent = math.floor(math.log10(number))
    mantissa = math.ceil(number / 10**exponent - 1e-9)
    return f"{mantissa}e{exponent}" if mantissa < 10 else f"1e{exponent + 1}"


def refusals(results: Sequence[Result]) -> str:
    """Every reason, with how many cells it refuses."""
    refused = [result for result in results if result.state == REFUSED]
    if not refused:
        return "## Refused\n\nNothing.\n"
    notes = Notes(refused)
    lines = [f"{number}. {reason} ({sum(reason in reasons(r) for r in refused)} combinations)" for number, reason in notes.items()]
    return "## Refused\n\n" + "\n".join(lines) + "\n"
