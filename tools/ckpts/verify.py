#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: whether checkpoints are what their manifests say, file by file."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.checkpoint.steps.manifest import Verify  # noqa: E402
from megatron.checkpoint.steps.step_dirs import survey  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402
from megatron.tool_flags import ToolParser  # noqa: E402

ABOUT = "Compares checkpoints with their manifests. Exit status 1 when one of them is bad."
USAGE = """python tools/ckpts/verify.py DIR [--sizes]

  DIR       the folder of one step, or one with several global_step<N>
  --sizes   compare names and sizes only; nothing is read"""


def main(argv: list[str]) -> int:
    """Print a line per step, and one per bad file."""
    flags = ToolParser(allow_abbrev=False, add_help=False, usage=USAGE)
    flags.add_argument("directory", type=Path)
    flags.add_argument("--sizes", action="store_true")
    given = flags.parse_args(argv)
    findings = survey(given.directory.resolve(), Verify.SIZE if given.sizes else Verify.FULL)
    for name, finding in findings.items():
        files = 0 if finding.manifest is None else len(finding.manifest.files)
        print(f"{name}: " + ("bad" if finding.bad else f"whole ({files} files)" if finding.whole else "no manifest: cannot be verified"))
        for problem in finding.problems:
            print(f"    {problem}")
    return int(any(finding.bad for finding in findings.values()))


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT, ranks=False, keys=False))
