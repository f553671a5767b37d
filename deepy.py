# SPDX-License-Identifier: Apache-2.0
"""The launcher: checks the configuration, then starts a script on every rank. Imports no torch, so mistakes are answered at once."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from megatron.neox_arguments import payload
from megatron.neox_arguments.cli import consume_deepy_args, run_face
from megatron.neox_arguments.launch import launcher_command, run
from megatron.neox_arguments.rules import refuse_unfinished

USAGE = "python deepy.py SCRIPT [-d DIR] CONF [CONF ...] [flags]"
ABOUT = """\
Merges the config files, checks them, and starts SCRIPT (train.py, eval.py, generate.py) on every rank.
The exit status is that of the workers; 2 means that the configuration cannot be used and nothing was started."""


def main(argv: list[str]) -> int:
    """Start what the command line asks for and wait for it."""
    launch = consume_deepy_args(argv)
    if Path(launch.script).name == "train.py":
        refuse_unfinished(launch.args)
    command = launcher_command(launch.args, launch.script, list(launch.script_args), os.environ)
    if launch.dry_run:
        shown = [f"{name}={payload.mask(name, value)}" for name, value in command.env.items()]
        print(shlex.join([*shown, *command.argv]))
        return 0
    return run(command)


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT))
