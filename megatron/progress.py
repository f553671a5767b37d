# SPDX-License-Identifier: Apache-2.0
"""The lines other tools read: each is formatted and parsed here. Knows neither a logger nor the training loop.

A line written by `format_*` is understood by `parse_*` of the same name, also when a log prefix stands before it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

_UNITS = ("", "KFLOPS", "MFLOPS", "GFLOPS", "TFLOPS", "PFLOPS", "EFLOPS", "ZFLOPS")
_NUMBER = r"[-+]?(?:[0-9][0-9.]*(?:[eE][-+]?[0-9]+)?|nan|inf|NAN|INF)"


@dataclass(frozen=True, kw_only=True)
class TrainingLine:
    """The numbers of one training line.

    samples_per_second: over the interval, all ranks
    elapsed_ms:         mean time of one iteration
    flops:              per device, FLOP/s
    mfu, hfu:           percent of the device's peak; None = the peak is not known
    losses:             name -> mean over the interval, in the order printed
    loss_scale:         fp16 only
    skipped, nan:       iterations of the interval that were not applied, and that were not finite
    """

    samples_per_second: float
    iteration: int
    train_iters: int
    elapsed_ms: float
    learning_rate: float
    flops: float
    mfu: float | None = None
    hfu: float | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    loss_scale: float | None = None
    skipped: int = 0
    nan: int = 0


def format_training(line: TrainingLine) -> str:
    """One training line; starts with a space, ends with ` |`.

    >>> format_training(TrainingLine(samples_per_second=53.12, iteration=7, train_iters=40, elapsed_ms=2409.6, learning_rate=8e-5,
    ...     flops=290.3e12, losses={"lm_loss": 1.5}))[:79]
    ' samples/sec: 53.120 | iteration        7/      40 | elapsed time per iteration'
    """
    pieces = [
        f"samples/sec: {line.samples_per_second:.3f}",
        f"iteration {line.iteration:8d}/{line.train_iters:8d}",
        f"elapsed time per iteration (ms): {line.elapsed_ms:.1f}",
        f"learning rate: {line.learning_rate:.3E}",
        f"approx flops per GPU: {format_flops(line.flops)}",
    ]
    if line.mfu is not None:
        hfu = line.mfu if line.hfu is None else line.hfu
        pieces += [f"MFU: {line.mfu:.2f}%", f"HFU: {hfu:.2f}%"]
    pieces += [f"{name}: {value:.6E}" for name, value in line.losses.items()]
    if line.loss_scale is not None:
        pieces.append(f"loss scale: {line.loss_scale:.1f}")
    pieces += [f"number of skipped iterations: {line.skipped:3d}", f"number of nan iterations: {line.nan:3d}"]
    return "".join(f" {piece} |" for piece in pieces)


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


def format_flops(flops: float) -> str:
    """FLOP/s in steps of 1000.

    >>> format_flops(290.3e12), format_flops(12.0), format_flops(3e25)
    ('290.3TFLOPS', '12.0', '30.0Yi')
    """
    for unit in _UNITS:
        if abs(flops) < 1000.0:
            return f"{flops:3.1f}{unit}"
        flops /= 1000.0
    return f"{flops:.1f}Yi"


def parse_flops(text: str) -> float:
    """The inverse of `format_flops`, to the printed digits."""
    number = re.fullmatch(rf"({_NUMBER})([KMGTPEZ]FLOPS|Yi)?", text.strip())
    if number is None:
        raise ValueError(f"not a FLOP/s figure: {text!r}")
    return float(number.group(1)) * _scale(number.group(2) or "")


def _scale(unit: str) -> float:
    if unit in ("", "%"):
        return 1.0
    return 1e24 if unit == "Yi" else 1000.0 ** _UNITS.index(unit)


@dataclass(frozen=True)
class EvaluationBlock:
    """Results of one validation or test pass.

    chart:   "validation", "test", ...
    prefix:  "iteration 100", "the end of training for val data", ...
    metrics: name -> value
    """

    chart: str
    prefix: str
    metrics: Mapping[str, float]


def format_evaluation(block: EvaluationBlock) -> str:
    """Three lines: the results between two rules of dashes."""
    values = "".join(f" {name} value: {value:.6E} |" for name, value in block.metrics.items())
    line = f" {block.chart} results at {block.prefix} |{values} "
    rule = "-" * (len(line) + 1)
    return f"{rule}\n{line}\n{rule}"


_EVALUATION = re.compile(r"(?:^|[\s\]])(\w+) results at ([^|\n]+?) \|([^\n]*)")
_VALUE = re.compile(rf" ([^|]+?) value: ({_NUMBER}) \|")


def parse_evaluation(text: str) -> EvaluationBlock | None:
    """The first evaluation block in `text` (its rules need not be there), or None."""
    found = _EVALUATION.search(text)
    if found is None:
        return None
    return EvaluationBlock(found.group(1), found.group(2), {name: float(value) for name, value in _VALUE.findall(found.group(3))})


def perplexity(loss: float) -> float:
    """exp(loss); infinity instead of an overflow."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


_MEMORY = re.compile(
    rf"after ([0-9]+) iterations memory \(MB\) \| allocated: ({_NUMBER}) \| max allocated: ({_NUMBER})"
    rf" \| reserved: ({_NUMBER}) \| max reserved: ({_NUMBER})"
)


@dataclass(frozen=True)
class MemoryLine:
    """Memory of this rank's device after some iterations, in MiB."""

    iterations: int
    allocated: float
    max_allocated: float
    reserved: float
    max_reserved: float


def format_memory(line: MemoryLine) -> str:
    """Printed once, after the first training line."""
    return (
        f"after {line.iterations} iterations memory (MB) | allocated: {line.allocated} | max allocated: {line.max_allocated}"
        f" | reserved: {line.reserved} | max reserved: {line.max_reserved}"
    )


def parse_memory(text: str) -> MemoryLine | None:
    """The numbers of a memory line, or None."""
    found = _MEMORY.search(text)
    return None if found is None else MemoryLine(int(found.group(1)), *(float(found.group(i)) for i in range(2, 6)))


def format_times(times_ms: Mapping[str, float]) -> str:
    """`time (ms) | forward: 1.00 | backward: 2.00`, as the timers of an interval are printed."""
    return "time (ms)" + "".join(f" | {name}: {value:.2f}" for name, value in times_ms.items())


def parse_times(text: str) -> dict[str, float] | None:
    """The numbers of a timer line, or None."""
    _, mark, rest = text.partition("time (ms)")
    if not mark or (rest.strip() and not rest.startswith(" | ")):
        return None
    return {name: float(value) for name, value in re.findall(rf"\| ([^|:]+): ({_NUMBER})", rest)}


def format_exit(rank: int, iteration: int, now: datetime) -> str:
    """Printed when the run ends before its last iteration."""
    return f"rank: {rank} | time: {now:%Y-%m-%d %H:%M:%S} | exiting the program at iteration {iteration}"


def parse_exit(text: str) -> tuple[int, int, datetime] | None:
    """(rank, iteration, time) of an exit line, or None."""
    found = re.search(r"rank: ([0-9]+) \| time: ([0-9-]+ [0-9:]+) \| exiting the program at iteration ([0-9]+)", text)
    if found is None:
        return None
    return int(found.group(1)), int(found.group(3)), datetime.strptime(found.group(2), "%Y-%m-%d %H:%M:%S")


def format_padded_vocab(size: int, padded: int) -> str:
    """How many ids were added so that the vocabulary can be divided."""
    return f" > padded vocab (size: {size}) with {padded - size} dummy tokens (new size: {padded})"


def parse_padded_vocab(text: str) -> tuple[int, int] | None:
    """(size, padded size), or None."""
    found = re.search(r"> padded vocab \(size: ([0-9]+)\) with [0-9]+ dummy tokens \(new size: ([0-9]+)\)", text)
    return None if found is None else (int(found.group(1)), int(found.group(2)))


def format_parameters(rank: int, count: int) -> str:
    """Parameters held by one model-parallel rank."""
    return f" > number of parameters on model parallel rank {rank}: {count}"


def format_total_parameters(count: int) -> str:
    """Parameters of the whole model."""
    return f" > total params: {count:,}"


def parse_total_parameters(text: str) -> int | None:
    """Parameters of the whole model, or None."""
    found = re.search(r"> total params: ([0-9,]+)", text)
    return None if found is None else int(found.group(1).replace(",", ""))


def format_resumed(iteration: int) -> str:
    """Printed when a checkpoint was loaded."""
    return f"Loading checkpoint and starting from iteration {iteration}"


def parse_resumed(text: str) -> int | None:
    """The iteration a run resumed from, or None."""
    found = re.search(r"Loading checkpoint and starting from iteration ([0-9]+)", text)
    return None if found is None else int(found.group(1))


def format_data_start(iteration: int) -> str:
    """Printed when the data is set to where a resumed run stopped."""
    return f"setting training data start iteration to {iteration}"


def read_training_lines(lines: Iterable[str]) -> list[TrainingLine]:
    """Every training line of a log, in order."""
    return [line for line in map(parse_training, lines) if line is not None]
