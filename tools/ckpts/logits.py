#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: the logits a checkpoint gives on fixed tokens: the instrument with which checkpoints are compared."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.neox_arguments.cli import consume_neox_args, run_face  # noqa: E402
from megatron.tool_flags import ALONE, READING  # noqa: E402

ABOUT = "Writes the logits [b, s, vocab] float32 that a checkpoint gives on tokens [b, s]."
USAGE = """python tools/ckpts/logits.py CONFIG [CONFIG ...] --load DIR [--iteration N] --tokens TOKENS.npy --output LOGITS.npy [--rows N]
   or: python deepy.py tools/ckpts/logits.py ... with the same words, for a configuration of any layout

  --tokens FILE   integers [b, s] (numpy.save)
  --output FILE   where the logits go
  --rows N        rows run at once (1)"""


def parser() -> argparse.ArgumentParser:
    """The flags of this tool; all others are configuration keys."""
    flags = argparse.ArgumentParser(allow_abbrev=False, add_help=False, usage=USAGE)
    flags.add_argument("--tokens", required=True, type=Path)
    flags.add_argument("--output", required=True, type=Path)
    flags.add_argument("--rows", type=int, default=1)
    return flags


def main(argv: list[str]) -> int:
    """Write the logits. Under a launcher each rank has its part of the model, and the first one writes."""
    given, others = parser().parse_known_args(argv)
    overwrites: dict[str, Any] = READING if "WORLD_SIZE" in os.environ else ALONE
    args = consume_neox_args(others, overwrites=overwrites)
    # Imported only now: a mistake in the configuration is reported before seconds go into loading torch.
    from megatron.generation.build import joined, load_model, whole_rows
    from megatron.generation.modes import write_logits

    with joined(args) as (groups, device):
        first = groups.world.rank == 0
        shape = write_logits(load_model(args, whole_rows(groups), device).model, given.tokens, given.output, rows=given.rows, write=first)
    if first:
        print(f"wrote {given.output}: {list(shape)} float32")
    return 0


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT))
