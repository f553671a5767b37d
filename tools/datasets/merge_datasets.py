#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: merges all `.bin/.idx` pairs of a folder into one pair."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.data.inspect.merging import merge_folder  # noqa: E402
from megatron.errors import NeoXError  # noqa: E402
from megatron.log import setup_logging  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402
from megatron.tool_flags import ToolParser  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = ToolParser(
        description="Merge all .bin/.idx pairs of a folder into one, in the order of their names. Document borders are kept.",
        allow_abbrev=False,
    )
    flags.add_argument("--input", required=True, help="folder that holds the pairs; those of the legacy cached/lazy format are read, too")
    flags.add_argument("--output-prefix", required=True, help="path of the merged pair, without .bin/.idx")
    flags.add_argument(
        "--by-stream",
        action="store_true",
        help="merge tokens, labels, rewards... each into a pair of its own: <output prefix>_document, <output prefix>_label_document...",
    )
    return flags


def main(argv: list[str] | None = None) -> int:
    """Merge; 0, or the error's exit code."""
    given = parser().parse_args(argv)
    setup_logging()
    try:
        results = merge_folder(given.input, given.output_prefix, by_stream=given.by_stream)
    except NeoXError as error:
        print(error.report(), file=sys.stderr)
        return error.exit_code
    for done in results:
        for part in done.parts:
            print(f"  {part}")
        print(
            f"wrote {done.prefix}.bin and .idx: {done.documents} documents, {done.values} values ({done.dtype}) of {len(done.parts)} pairs"
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=parser().format_help().removeprefix("usage: "), about="", ranks=False, keys=False))
