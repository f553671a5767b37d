#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: train a BPE tokenizer on JSON lines or plain text and write it as tokenizer.json."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.data.preprocess.blocks import texts  # noqa: E402
from megatron.data.preprocess.inputs import find  # noqa: E402
from megatron.data.preprocess.sources import Files  # noqa: E402
from megatron.errors import NeoXError  # noqa: E402
from megatron.log import setup_logging  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402
from megatron.tokenizer.train import save_tokenizer, train_bpe  # noqa: E402
from megatron.tool_flags import ToolParser  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = ToolParser(description="Train a byte-level BPE tokenizer.", allow_abbrev=False)
    given = flags.add_mutually_exclusive_group(required=True)
    given.add_argument("--json_input_dir", "--json-input-dir", help="folder (or file) of JSON lines, plain, .gz or .zst")
    given.add_argument("--input", nargs="+", help="files or folders: JSON lines or plain text")
    flags.add_argument("--json_key", "--json-key", default="text", help="key that holds the text of a JSON line (default: text)")
    flags.add_argument("--tokenizer_output_path", "--tokenizer-output-path", required=True, help="where to write the tokenizer.json")
    flags.add_argument("--tokenizer_type", "--tokenizer-type", default="BPE", choices=["BPE"])
    flags.add_argument("-v", "--vocab_size", "--vocab-size", type=int, default=52000, help="ids, special tokens included (default: 52000)")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Train and write; 0, or the error's exit code."""
    given = parser().parse_args(argv)
    setup_logging()
    output = Path(given.tokenizer_output_path)
    output = output if output.suffix == ".json" else output / "tokenizer.json"
    try:
        engine = train_bpe(
            texts(Files(find(given.input or [given.json_input_dir]), columns=(given.json_key,)), given.json_key),
            vocab_size=given.vocab_size,
        )
        save_tokenizer(engine, output)
    except NeoXError as error:
        print(error.report(), file=sys.stderr)
        return error.exit_code
    print(f"wrote {output}: {engine.get_vocab_size()} ids")
    return 0


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=parser().format_help().removeprefix("usage: "), about="", ranks=False, keys=False))
