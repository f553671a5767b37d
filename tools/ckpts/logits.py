#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: the logits a checkpoint gives on fixed tokens: the instrument with which checkpoints are compared."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.errors import NeoXError  # noqa: E402
from megatron.generation.build import load_model  # noqa: E402
from megatron.generation.layout import ALONE  # noqa: E402
from megatron.generation.logits import write_logits  # noqa: E402
from megatron.log import setup_logging  # noqa: E402
from megatron.neox_arguments.cli import consume_neox_args  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(description="Write a checkpoint's logits [b, s, vocab] float32 on tokens [b, s].", allow_abbrev=False)
    flags.add_argument("configs", nargs="+", metavar="CONFIG", help="the YAML files the checkpoint was trained with")
    flags.add_argument("--load", help="checkpoint directory (default: the `load` key)")
    flags.add_argument("--iteration", type=int, help="step to read (default: the `iteration` key, else `latest`)")
    flags.add_argument("--tokens", required=True, type=Path, help=".npy of integers [b, s]")
    flags.add_argument("--output", required=True, type=Path, help=".npy to write")
    flags.add_argument("--rows", type=int, default=1, help="rows run at once (default: 1)")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Write the logits; 0, or the error's exit code."""
    given, others = parser().parse_known_args(argv)
    setup_logging()
    overwrites: dict[str, Any] = {**ALONE}
    overwrites.update({key: value for key, value in (("load", given.load), ("iteration", given.iteration)) if value is not None})
    try:
        args = consume_neox_args([*given.configs, *others], overwrites=overwrites)
        shape = write_logits(load_model(args).model, given.tokens, given.output, rows=given.rows)
    except NeoXError as error:
        print(error.report(), file=sys.stderr)
        return error.exit_code
    print(f"wrote {given.output}: {list(shape)} float32")
    return 0


if __name__ == "__main__":
    sys.exit(main())
