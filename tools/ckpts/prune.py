#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: deletes old checkpoints by the rules of `keep_last_n_checkpoints`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.checkpoint.steps.manifest import Verify  # noqa: E402
from megatron.checkpoint.steps.step_dirs import prune, removable, saved_steps, step_tag  # noqa: E402  # noqa: E402
from megatron.errors import CheckpointError, ConfigError  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402
from megatron.tool_flags import ToolParser  # noqa: E402

ABOUT = "Deletes old checkpoints. The newest whole one, and one that is being uploaded, always stay."
USAGE = """python tools/ckpts/prune.py DIR --keep N [--keep-every M] [--protect STEP ...] [--sizes] [--dry-run]

  DIR              the folder with global_step<N>
  --keep N         how many of the newest whole checkpoints stay
  --keep-every M   steps that are multiples of M stay too
  --protect STEP   these steps stay too
  --sizes          tell whole ones by names and sizes; otherwise every file is read
  --dry-run        only say what would be deleted"""


def main(argv: list[str]) -> int:
    """Print what goes."""
    flags = ToolParser(allow_abbrev=False, add_help=False, usage=USAGE)
    flags.add_argument("directory", type=Path)
    flags.add_argument("--keep", required=True, type=int)
    flags.add_argument("--keep-every", type=int)
    flags.add_argument("--protect", nargs="+", type=int, default=[])
    flags.add_argument("--sizes", action="store_true")
    flags.add_argument("--dry-run", action="store_true")
    given = flags.parse_args(argv)
    for flag, least in (("keep", given.keep), ("keep-every", given.keep_every)):
        if least is not None and least < 1:
            raise ConfigError(f"--{flag} {least} is no number of checkpoints or steps", where="command line", fix="give 1 or more")
    if not saved_steps(given.directory):
        raise CheckpointError("no global_step<N> folder is there", where=str(given.directory), fix="name the folder of several checkpoints")
    choose = removable if given.dry_run else prune
    verify = Verify.SIZE if given.sizes else Verify.FULL
    gone = choose(given.directory, keep=given.keep, protected=given.protect, every=given.keep_every, verify=verify)
    for step in gone:
        print(f"{'would delete' if given.dry_run else 'deleted'} {given.directory / step_tag(step)}")
    left = [step for step in saved_steps(given.directory) if step not in gone]
    print(f"{len(gone)} {'would go' if given.dry_run else 'deleted'}; left: {', '.join(map(str, left)) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT, ranks=False, keys=False))
