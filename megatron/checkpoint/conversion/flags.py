# SPDX-License-Identifier: Apache-2.0
"""The flags that all converters share. Imports nothing heavy, so that a mistake on the command line is told at once."""

from __future__ import annotations

import argparse
from typing import Any

from megatron.tool_flags import ToolParser

SHARED = """
  --overwrite        replace the output folder, where there is one
  --verify           compare the logits of source and result, of the whole model whatever its size; without this flag,
                     those of a few layers where there are more than 2 billion parameters
  --no-verify        do not"""


def parser(usage: str) -> argparse.ArgumentParser:
    """With the shared flags."""
    flags = ToolParser(allow_abbrev=False, add_help=False, usage=usage)
    flags.add_argument("--overwrite", action="store_true")
    flags.add_argument("--verify", action=argparse.BooleanOptionalAction, default=None)
    return flags


def shared(given: argparse.Namespace) -> dict[str, Any]:
    """Their values, as a request takes them."""
    return {"overwrite": given.overwrite, "verify": given.verify}
