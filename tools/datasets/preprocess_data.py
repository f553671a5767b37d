#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: texts into .bin/.idx files for training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.data.preprocess import flags as shared  # noqa: E402
from megatron.data.preprocess.encoders import TextSource  # noqa: E402
from megatron.data.preprocess.inputs import find  # noqa: E402
from megatron.data.preprocess.sources import Files  # noqa: E402
from megatron.data.preprocess.writer import write  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402
from megatron.tool_flags import ToolParser  # noqa: E402

ABOUT = """Tokenizes texts and writes <prefix>_<key>_document.bin and .idx, and <prefix>_metadata.json.
The files appear when they are whole; a run that was killed goes on where it stopped when it is started again in the same way."""


def parser() -> argparse.ArgumentParser:
    """The flags. Prefixes of them work, as users of --vocab are used to."""
    flags = ToolParser(prog="preprocess_data.py", description=ABOUT, add_help=False)
    shared.add_input(flags, keys=["text"])
    shared.add_tokenizer(flags)
    flags.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    flags.add_argument("--ftfy", action="store_true", help="fix mis-decoded text with ftfy first")
    shared.add_output(flags)
    return flags


def main(argv: list[str]) -> int:
    """Write the files; print what was written."""
    given = parser().parse_args(argv)
    keys = tuple(dict.fromkeys(given.jsonl_keys))
    prefix = shared.prefix_of(given)
    source = Files(find(given.input, split=given.split), columns=keys)
    chosen = shared.choose_tokenizer(given, source, keys)
    encoder = TextSource(chosen.source, given.append_eod, keys, given.ftfy, wide=given.dataset_impl != "mmap")
    opened = encoder.open(chosen.tokenizer) if chosen.tokenizer else None
    print(shared.summary(write(source, encoder, prefix, shared.options(given, tokenizer=chosen.about), encoder=opened)))
    return 0


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=parser().format_help().removeprefix("usage: "), about="", ranks=False, keys=False))
