#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: what is in a checkpoint, and where two differ. Nothing found in a file is executed."""

from __future__ import annotations

import argparse
import code
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.neox_arguments.cli import run_face  # noqa: E402
from megatron.tool_flags import ToolParser  # noqa: E402

if TYPE_CHECKING:
    from megatron.checkpoint.conversion.inspect import TensorSelection, TensorStatistics

ABOUT = "Shows names, shapes, dtypes and numbers of a checkpoint, or where two checkpoints differ (exit status 1 when they do)."
USAGE = """python tools/ckpts/inspect_checkpoints.py PATH [--iteration N] [--stats] [--filter REGEX] [--json]
   or: python tools/ckpts/inspect_checkpoints.py PATH --diff OTHER [--other-iteration N]

  PATH                   a step's folder, a folder of steps (the step `latest` names, or --iteration), a .pt or .safetensors file,
                         a folder of safetensors; "A,B" compares two. --checkpoint-path PATH means the same
  --iteration N          the step, where PATH is a folder of steps
  --diff OTHER           compare with another checkpoint: names, shapes, dtypes, largest difference per tensor (-d; also -c, --compare)
  --other-iteration N    the step of OTHER (default: as PATH)
  --stats                min, max, mean, std, norm, share of zeros, share that is not finite, of every tensor (-s)
  --filter REGEX         only what has this in its name `file/name` (-f)
  --attributes NAME ...  only what is under these names, such as optimizer_state_dict/base_optimizer_state (-a)
  --tensors              no plain values (iteration, settings, ...)
  --json                 one JSON object instead of text
  --interactive          a Python prompt with `checkpoint`: {file: {name: value}} (-i)"""


def parser() -> argparse.ArgumentParser:
    """The flags of this tool."""
    flags = ToolParser(allow_abbrev=False, add_help=False, usage=USAGE)
    flags.add_argument("path", nargs="?")
    flags.add_argument("--checkpoint-path", "--checkpoint_path", dest="named")
    flags.add_argument("--iteration", type=int)
    flags.add_argument("-d", "--diff", "-c", "--compare", dest="other", nargs="?", const="")
    flags.add_argument("--other-iteration", type=int)
    flags.add_argument("-s", "--stats", action="store_true")
    flags.add_argument("-f", "--filter", default="")
    flags.add_argument("-a", "--attributes", nargs="+", default=[])
    flags.add_argument("--tensors", action="store_true")
    flags.add_argument("--json", action="store_true")
    flags.add_argument("-i", "--interactive", action="store_true")
    return flags


def two_paths(given: argparse.Namespace) -> tuple[Path, Path | None]:
    """What to look at, and what to compare it with."""
    first, other = given.named or given.path, given.other
    if first is None and other:  # the order `--diff A,B`
        first, other = other, ""
    if first is None or (given.named and given.path):
        parser().error("give one PATH")
    if not other and "," in first and not Path(first).exists():
        first, _, other = first.partition(",")
    if other == "":
        parser().error("--diff needs a second checkpoint")
    return Path(first), Path(other) if other else None


def main(argv: list[str]) -> int:
    """Print what was asked for."""
    given = parser().parse_args(argv)
    first, other = two_paths(given)
    # Imported only now: help and mistakes in the flags need no torch.
    from megatron.checkpoint.conversion import inspect

    wanted = inspect.TensorSelection(pattern=given.filter, under=tuple(given.attributes), tensors=given.tensors)
    files = inspect.locate(first, given.iteration)
    if other is not None:
        step = given.iteration if given.other_iteration is None else given.other_iteration
        found = list(inspect.differences(files, inspect.locate(other, None if other.is_file() else step), wanted))
        if given.json:
            rows = [asdict(one) | {"max_abs": _finite(one.max_abs)} for one in found]
            print(json.dumps({"first": str(first), "second": str(other), "equal": not found, "differences": rows}, indent=1))
            return int(bool(found))
        for one in found:
            gap = "" if one.max_abs is None else f"   max abs difference {one.max_abs:.6g}"
            print(f"{one.name}: {one.kind}: {one.first} | {one.second}{gap}")
        print(f"{len(found)} differences" if found else "no differences")
        return int(bool(found))
    if given.interactive:
        code.interact(local={"checkpoint": {name: inspect.read(path) for name, path in files.items()}}, banner="checkpoint[file][name]")
        return 0
    if given.json:
        rows = [inspect.as_row(*entry, numbers=given.stats) for entry in inspect.entries(files, wanted)]
        print(json.dumps({"path": str(first), "layout": inspect.layout(files), "entries": rows}, indent=1))
        return 0
    show(files, wanted, numbers=given.stats)
    return 0


def show(files: Mapping[str, Path], wanted: TensorSelection, *, numbers: bool) -> None:
    """The tree, as text."""
    from torch import Tensor

    from megatron.checkpoint.conversion import inspect

    print(inspect.layout(files))
    before: list[str] = []
    tensors = parameters = size = 0
    for file, name, value in inspect.entries(files, wanted):
        parts = [file, *name.split("/")]
        same = next((i for i, (a, b) in enumerate(zip(before, parts, strict=False)) if a != b), min(len(before), len(parts)))
        for depth in range(min(same, len(parts) - 1), len(parts) - 1):
            print(f"{'  ' * depth}{parts[depth]}")
        before = parts
        indent = "  " * (len(parts) - 1)
        if not isinstance(value, Tensor):
            print(f"{indent}{parts[-1]} = {inspect.kind(value)}")
            continue
        tensors, parameters, size = tensors + 1, parameters + value.numel(), size + value.numel() * value.element_size()
        print(f"{indent}{parts[-1]}  {inspect.kind(value)}{'  ' + _numbers(inspect.statistics(value)) if numbers else ''}")
    print(f"{tensors} tensors, {parameters:,} elements, {size / 2**20:,.2f} MiB")


def _numbers(found: TensorStatistics) -> str:
    return "  ".join(f"{name} {value:.6g}" for name, value in asdict(found).items())


def _finite(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT, keys=False))
