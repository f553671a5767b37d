#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: counts the tokens of `.bin/.idx` pairs."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.data.legacy_dataset import open_any  # noqa: E402
from megatron.errors import NeoXError  # noqa: E402

USAGE = "usage: dataset_token_count.py PREFIX [PREFIX ...]\n\nPrints the number of tokens of each dataset. PREFIX: path without .bin/.idx."


def main(argv: list[str] | None = None) -> int:
    """Count each; 1 without arguments, else 0 or the exit code of the last error. What can be read is counted in any case."""
    prefixes = sys.argv[1:] if argv is None else argv
    if not prefixes or not {"-h", "--help"}.isdisjoint(prefixes):
        print(USAGE)
        return 0 if prefixes else 1
    status, total = 0, 0
    for prefix in prefixes:
        print(f"Checking file {prefix}")
        try:
            tokens = open_any(prefix).num_tokens
        except NeoXError as error:
            print(error.report(), file=sys.stderr)
            status = error.exit_code
            continue
        total += tokens
        print(f"Dataset size in tokens is {tokens}")
    if len(prefixes) > 1 and not status:
        print(f"Total size in tokens is {total}")
    return status


if __name__ == "__main__":
    sys.exit(main())
