# SPDX-License-Identifier: Apache-2.0
"""Losses of a trained model on its validation and test data. `python eval.py CONF...` alone, or started by deepy.py."""

from __future__ import annotations

import os
import sys
from datetime import datetime
from pathlib import Path

from megatron.errors import StoppedError
from megatron.neox_arguments.cli import consume_neox_args, run_face
from megatron.tool_flags import ALONE, READING

USAGE = "python eval.py CONF [CONF ...] [flags]   (or: python deepy.py eval.py ...)"
ABOUT = "Evaluates the checkpoint that `load` names and writes [prefix_]eval_results_MM-DD-YYYY-HH-MM-SS.json."


def main(argv: list[str]) -> None:
    """Read the configuration, evaluate, write the results."""
    alone = {key: ALONE[key] for key in ALONE if "batch" not in key and "accumulation" not in key}
    args = consume_neox_args(argv, overwrites=READING if "WORLD_SIZE" in os.environ else alone)
    # Imported only now: a mistake in the configuration is reported before seconds go into loading torch.
    from megatron.evaluation.build import evaluate, write_results

    prefix = f"{args.text.eval_results_prefix}_" if args.text.eval_results_prefix else ""
    path = Path(f"{prefix}eval_results_{datetime.now():%m-%d-%Y-%H-%M-%S}.json")
    found = evaluate(args)
    if os.environ.get("RANK", "0") == "0":
        print(f"wrote {write_results(found, path)}")
    if "stopped_by" in found:
        raise StoppedError(found["stopped_by"], f" after {len(found['results'])} split", where=str(path))


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT))
