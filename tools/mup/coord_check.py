#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: muP's coordinate check: trains a configuration at several widths and says whether its activations grow with them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.neox_arguments.cli import consume_neox_args, run_face  # noqa: E402
from megatron.tool_flags import ALONE  # noqa: E402

ABOUT = "Trains the configured model for a few steps at several widths and measures its activations (arXiv 2203.03466, app. D.1)."
USAGE = """python tools/mup/coord_check.py CONFIG [CONFIG ...] [--widths W,W,...] [--steps N] [--max_slope S] [--output DIR]

  --widths W,W,...  values of hidden_size (64,128,256,512)
  --steps N         updates on one batch of random tokens (3)
  --max_slope S     the check fails when, after the last update, log |activation| of a kind of layer rises faster than
                    S times log width (0.2)
  --output DIR      where coordinates.json and coordinates.png go (coord_check)

  To see what the check guards against, give --use_mup false as well."""


def widths(text: str) -> list[int]:
    """`64,128` -> [64, 128]."""
    return [int(word) for word in text.split(",")]


def parser() -> argparse.ArgumentParser:
    """The flags of this tool; all others are configuration keys."""
    flags = argparse.ArgumentParser(allow_abbrev=False, add_help=False, usage=USAGE)
    flags.add_argument("--widths", type=widths, default=[64, 128, 256, 512])
    flags.add_argument("--steps", type=int, default=3)
    flags.add_argument("--max_slope", type=float, default=0.2)
    flags.add_argument("--output", type=Path, default=Path("coord_check"))
    return flags


def main(argv: list[str]) -> int:
    """Measure, write the report, and answer 1 where activations grow with width."""
    given, others = parser().parse_known_args(argv)
    args = consume_neox_args(others, overwrites={**ALONE, "coord_check": False})
    # Imported only now: a mistake in the configuration is reported before seconds go into loading torch.
    from megatron.evaluation.build_coordinates import coordinate_check
    from megatron.evaluation.coordinates import slopes, steepest, write_report

    sizes = coordinate_check(args, given.widths, steps=given.steps)
    found = slopes(sizes)
    for kind, by_step in found.items():
        print(f"{kind:>10}: slope of log |activation| over log width, by step: " + " ".join(f"{slope:+.3f}" for slope in by_step))
    print(f"wrote {write_report(sizes, given.output, max_slope=given.max_slope)}/coordinates.json and coordinates.png")
    kind, slope = steepest(found)
    if slope > given.max_slope:
        print(f"coordinate check failed: {kind} grows with width to the power of {slope:.3f}, more than {given.max_slope}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT))
