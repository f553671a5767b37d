# SPDX-License-Identifier: Apache-2.0
"""The lines of a run that other tools read, as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

UNITS = ("", "KFLOPS", "MFLOPS", "GFLOPS", "TFLOPS", "PFLOPS", "EFLOPS", "ZFLOPS")


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


def format_flops(flops: float) -> str:
    """FLOP/s in steps of 1000.

    >>> format_flops(290.3e12), format_flops(12.0), format_flops(3e25)
    ('290.3TFLOPS', '12.0', '30.0Yi')
    """
    for unit in UNITS:
        if abs(flops) < 1000.0:
            return f"{flops:3.1f}{unit}"
        flops /= 1000.0
    return f"{flops:.1f}Yi"


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


def perplexity(loss: float) -> float:
    """exp(loss); infinity instead of an overflow."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


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


def format_times(times_ms: Mapping[str, float]) -> str:
    """`time (ms) | forward: 1.00 | backward: 2.00`, as the timers of an interval are printed."""
    return "time (ms)" + "".join(f" | {name}: {value:.2f}" for name, value in times_ms.items())


def format_exit(rank: int, iteration: int, now: datetime) -> str:
    """Printed when the run ends before its last iteration."""
    return f"rank: {rank} | time: {now:%Y-%m-%d %H:%M:%S} | exiting the program at iteration {iteration}"
