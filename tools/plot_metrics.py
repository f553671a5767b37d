#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: draws the loss of one or more runs from their metrics.jsonl, and says how far validation fell."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TRAIN = "lm_loss"
VALID = "valid_lm_loss"


class Unreadable(Exception):
    """A metrics file is missing, or holds no losses."""


@dataclass
class Curve:
    """Points of one quantity over iterations; a later point of the same iteration replaces an earlier one."""

    points: dict[int, float] = field(default_factory=dict)

    def rows(self) -> tuple[list[int], list[float]]:
        """Iterations in order, and their values."""
        steps = sorted(self.points)
        return steps, [self.points[step] for step in steps]


@dataclass
class Run:
    """Training and validation loss of one run."""

    name: str
    train: Curve = field(default_factory=Curve)
    valid: Curve = field(default_factory=Curve)


def read_run(path: Path) -> Run:
    """The losses in a metrics.jsonl; a last line cut short by a crash is passed over.

    A run that was resumed from an earlier checkpoint has trained some iterations twice; the later row counts.
    Raises Unreadable.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise Unreadable(f"cannot read {path}: {error.strerror}") from None
    run = Run(path.parent.name or path.name)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                continue
            raise Unreadable(f"{path}:{number} is not JSON") from None
        if not isinstance(row, dict):
            raise Unreadable(f"{path}:{number} is not an object")
        for key, curve in ((TRAIN, run.train), (VALID, run.valid)):
            if isinstance(row.get(key), int | float) and "iteration" in row:
                curve.points[int(row["iteration"])] = float(row[key])
    if not (run.train.points or run.valid.points):
        raise Unreadable(f"{path} has neither {TRAIN} nor {VALID}")
    return run


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average, corrected for its start.

    >>> smooth([2.0, 4.0], 0.5)
    [2.0, 3.3333333333333335]
    """
    mean, mass, out = 0.0, 0.0, []
    for value in values:
        mean, mass = weight * mean + (1 - weight) * value, weight * mass + (1 - weight)
        out.append(mean / mass)
    return out


def draw(runs: Iterable[Run], output: Path, weight: float) -> None:
    """Write the picture to `output` (png, pdf, svg), aside first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for number, run in enumerate(runs):
        colour = f"C{number}"
        steps, losses = run.train.rows()
        if steps:
            axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=1)
            axes.plot(steps, smooth(losses, weight), color=colour, linewidth=2, label=f"{run.name}: training")
        steps, losses = run.valid.rows()
        if steps:
            axes.plot(steps, losses, color=colour, marker="o", linestyle="--", linewidth=1, label=f"{run.name}: validation")
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f"{output.name}.tmp.{os.getpid()}")
    figure.savefig(aside, format=output.suffix[1:] or "png", dpi=120)
    aside.rename(output)
    pyplot.close(figure)


def summary(run: Run) -> str:
    """One line: how the validation loss (or, without any, the training loss) changed."""
    what, curve = ("validation", run.valid) if run.valid.points else ("training", run.train)
    steps, losses = curve.rows()
    fell = 100 * (losses[0] - losses[-1]) / losses[0] if losses[0] else 0.0
    return f"{run.name}: {what} loss {losses[0]:.4f} (iteration {steps[0]}) -> {losses[-1]:.4f} (iteration {steps[-1]}), {fell:.1f}% lower"


def main(argv: list[str] | None = None) -> int:
    """Draw and report; 0, or 1 with a message."""
    flags = argparse.ArgumentParser(description="Draw the loss of one or more runs.", allow_abbrev=False)
    flags.add_argument("metrics", nargs="+", type=Path, help="metrics.jsonl, or the folder that holds it")
    flags.add_argument("-o", "--output", type=Path, help="picture (default: loss.png beside the first metrics.jsonl)")
    flags.add_argument("--smooth", type=float, default=0.9, help="weight of the past in the training curve, 0 to 1 (default 0.9)")
    given = flags.parse_args(argv)
    if not 0 <= given.smooth < 1:
        flags.error(f"--smooth {given.smooth} is not in [0, 1)")
    paths = [path / "metrics.jsonl" if path.is_dir() else path for path in given.metrics]
    output = given.output or paths[0].with_name("loss.png")
    if output.suffix not in (".png", ".pdf", ".svg"):
        flags.error(f"--output {output} does not end in .png, .pdf or .svg")
    try:
        runs = [read_run(path) for path in paths]
    except Unreadable as error:
        print(f"plot_metrics: {error}", file=sys.stderr)
        return 1
    draw(runs, output, given.smooth)
    for run in runs:
        print(summary(run))
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
