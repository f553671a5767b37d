#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: texts into .bin/.idx files with labels that leave out everything up to a delimiter."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.data.preprocess import flags as shared  # noqa: E402
from megatron.data.preprocess.encoders import MaskSource  # noqa: E402
from megatron.data.preprocess.inputs import find  # noqa: E402
from megatron.data.preprocess.sources import Files  # noqa: E402
from megatron.data.preprocess.writer import write  # noqa: E402
from megatron.errors import ConfigError  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402
from megatron.tool_flags import ToolParser  # noqa: E402

ABOUT = """Tokenizes texts and writes <prefix>_text_document and <prefix>_label_document (.bin and .idx), and <prefix>_metadata.json.
Labels are -100 up to and including the first occurrence of --mask-before-token, and the tokens themselves after it."""


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = ToolParser(prog="preprocess_data_with_mask.py", description=ABOUT, add_help=False)
    shared.add_input(flags, keys=["text"])
    shared.add_tokenizer(flags)
    flags.add_argument("--mask-before-token", default="", help="token ids, separated by commas; without it every token is trained")
    flags.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    flags.add_argument("--ftfy", action="store_true", help="fix mis-decoded text with ftfy first")
    shared.add_output(flags)
    return flags


def main(argv: list[str]) -> int:
    """Write the files; print what was written."""
    given = parser().parse_args(argv)
    if len(given.jsonl_keys) != 1:
        raise ConfigError("one key is masked at a time", where="--jsonl-keys", fix="run the tool once for each key")
    try:
        pattern = tuple(int(part) for part in given.mask_before_token.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(
            f"{given.mask_before_token!r} is no list of token ids", where="--mask-before-token", fix="for instance 200,34,79"
        ) from error
    keys = (given.jsonl_keys[0],)
    prefix = shared.prefix_of(given)
    source = Files(find(given.input, split=given.split), columns=keys)
    chosen = shared.choose_tokenizer(given, source, keys)
    encoder = MaskSource(chosen.source, given.append_eod, pattern, keys[0], given.ftfy)
    opened = encoder.open(chosen.tokenizer) if chosen.tokenizer else None
    print(shared.summary(write(source, encoder, prefix, shared.options(given, tokenizer=chosen.about), encoder=opened)))
    return 0


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=parser().format_help().removeprefix("usage: "), about="", ranks=False, keys=False))
