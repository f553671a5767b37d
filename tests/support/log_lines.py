# SPDX-License-Identifier: Apache-2.0
"""The lines that megatron.progress formats, read back: `parse_*` understands what `format_*` wrote, also behind a log prefix."""

from __future__ import annotations

import math
import re
from datetime import datetime

from megatron.progress import UNITS, EvaluationBlock, MemoryLine, TrainingLine

_NUMBER = r"[-+]?(?:[0-9][0-9.]*(?:[eE][-+]?[0-9]+)?|nan|inf|NAN|INF)"


_KNOWN_PIECES = frozenset(
    {
        "samples/sec",
        "elapsed time per iteration (ms)",
        "learning rate",
        "approx flops per GPU",
        "MFU",
        "HFU",
        "loss scale",
        "number of skipped iterations",
        "number of nan iterations",
    }
)


_ITERATION = re.compile(r"\biteration\s+([0-9]+)/\s*([0-9]+) \|")


_PIECE = re.compile(rf"([^|:]+): +({_NUMBER})([KMGTPEZ]FLOPS|Yi|%)? *\|")


def parse_training(text: str) -> TrainingLine | None:
    """The numbers of a training line, or None when `text` is not one."""
    where = _ITERATION.search(text)
    if where is None:
        return None
    found: dict[str, float] = {}
    for name, number, unit in _PIECE.findall(text):
        found[name.strip().rpartition("]")[2].strip()] = float(number) * _scale(unit)
    if "learning rate" not in found or "elapsed time per iteration (ms)" not in found:
        return None
    samples = re.search(rf"samples/sec: ({_NUMBER})", text)
    return TrainingLine(
        samples_per_second=float(samples.group(1)) if samples else math.nan,
        iteration=int(where.group(1)),
        train_iters=int(where.group(2)),
        elapsed_ms=found["elapsed time per iteration (ms)"],
        learning_rate=found["learning rate"],
        flops=found.get("approx flops per GPU", math.nan),
        mfu=found.get("MFU"),
        hfu=found.get("HFU"),
        losses={name: value for name, value in found.items() if name not in _KNOWN_PIECES and not name.endswith("samples/sec")},
        loss_scale=found.get("loss scale"),
        skipped=int(found.get("number of skipped iterations", 0)),
        nan=int(found.get("number of nan iterations", 0)),
    )


def parse_flops(text: str) -> float:
    """The inverse of `format_flops`, to the printed digits."""
    number = re.fullmatch(rf"({_NUMBER})([KMGTPEZ]FLOPS|Yi)?", text.strip())
    if number is None:
        raise ValueError(f"not a FLOP/s figure: {text!r}")
    return float(number.group(1)) * _scale(number.group(2) or "")


def _scale(unit: str) -> float:
    if unit in ("", "%"):
        return 1.0
    return 1e24 if unit == "Yi" else 1000.0 ** UNITS.index(unit)


_EVALUATION = re.compile(r"(?:^|[\s\]])(\w+) results at ([^|\n]+?) \|([^\n]*)")


_VALUE = re.compile(rf" ([^|]+?) value: ({_NUMBER}) \|")


def parse_evaluation(text: str) -> EvaluationBlock | None:
    """The first evaluation block in `text` (its rules need not be there), or None."""
    found = _EVALUATION.search(text)
    if found is None:
        return None
    return EvaluationBlock(found.group(1), found.group(2), {name: float(value) for name, value in _VALUE.findall(found.group(3))})


_MEMORY = re.compile(
    rf"after ([0-9]+) iterations memory \(MB\) \| allocated: ({_NUMBER}) \| max allocated: ({_NUMBER})"
    rf" \| reserved: ({_NUMBER}) \| max reserved: ({_NUMBER})"
)


def parse_memory(text: str) -> MemoryLine | None:
    """The numbers of a memory line, or None."""
    found = _MEMORY.search(text)
    return None if found is None else MemoryLine(int(found.group(1)), *(float(found.group(i)) for i in range(2, 6)))


def parse_times(text: str) -> dict[str, float] | None:
    """The numbers of a timer line, or None."""
    _, mark, rest = text.partition("time (ms)")
    if not mark or (rest.strip() and not rest.startswith(" | ")):
        return None
    return {name: float(value) for name, value in re.findall(rf"\| ([^|:]+): ({_NUMBER})", rest)}


def parse_exit(text: str) -> tuple[int, int, datetime] | None:
    """(rank, iteration, time) of an exit line, or None."""
    found = re.search(r"rank: ([0-9]+) \| time: ([0-9-]+ [0-9:]+) \| exiting the program at iteration ([0-9]+)", text)
    if found is None:
        return None
    return int(found.group(1)), int(found.group(3)), datetime.strptime(found.group(2), "%Y-%m-%d %H:%M:%S")
