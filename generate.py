# SPDX-License-Identifier: Apache-2.0
"""Text from a trained model. `python generate.py CONF...` alone, or started by deepy.py."""

from __future__ import annotations

import os
import sys

from megatron.neox_arguments.cli import consume_neox_args, run_face
from megatron.tool_flags import ALONE, READING

USAGE = "python generate.py CONF [CONF ...] [flags]   (or: python deepy.py generate.py ...)"
ABOUT = "Writes text with the checkpoint that `load` names, as text_gen_type and the sampling keys say."


def main(argv: list[str]) -> None:
    """Read the configuration, then generate."""
    args = consume_neox_args(argv, overwrites=READING if "WORLD_SIZE" in os.environ else ALONE)
    # Imported only now: a mistake in the configuration is reported before seconds go into loading torch.
    from megatron.generation.build import generate

    written = generate(args, sys.stdin, sys.stdout)
    if written is not None:
        print(f"wrote {written}")


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT))
