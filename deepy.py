# SPDX-License-Identifier: Apache-2.0
"""The launcher: checks the configuration, then starts a script on every rank. Imports no torch, so mistakes are answered at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron.launch.launcher_process import run
from megatron.log import get_logger
from megatron.neox_arguments.cli import consume_deepy_args, run_face
from megatron.neox_arguments.launch import plan_launch
from megatron.neox_arguments.unfinished import refuse_unfinished

USAGE = "python deepy.py SCRIPT [-d DIR] CONF [CONF ...] [flags]"
ABOUT = """\
Merges the config files, checks them, and starts SCRIPT (train.py, eval.py, generate.py) on every rank.
The exit status is that of the workers; 77 means that the configuration cannot be used and nothing was started."""


def main(argv: list[str]) -> int:
    """Start what the command line asks for and wait for it."""
    launch = consume_deepy_args(argv)
    if Path(launch.script).name == "train.py":
        refuse_unfinished(launch.args)
    plan = plan_launch(launch.args, launch.script, launch.script_args, os.environ)
    if launch.dry_run:
        print(plan.show(), end="")
        return 0
    get_logger(__name__).info("%s", plan.summary())
    sys.stdout.flush()
    return run(plan, os.environ, told=lambda report: print(report, file=sys.stderr, flush=True))


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT, ranks=False))
