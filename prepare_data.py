#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: make a named corpus ready for training. `python prepare_data.py pydoc` needs no network."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron.data.hf.corpora import CORPORA
from megatron.data.hf.prepare_corpus import CorpusRequest, prepare
from megatron.errors import NeoXError
from megatron.log import setup_logging
from megatron.neox_arguments.cli import run_face
from megatron.tokenizer import TokenizerKind
from megatron.tool_flags import ToolParser


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = ToolParser(description="Download a named corpus and tokenise it into .bin/.idx.", allow_abbrev=False)
    flags.add_argument(
        "dataset", nargs="?", default="enwik8", choices=[corpus.name for corpus in CORPORA], help="name of the corpus (default: enwik8)"
    )
    flags.add_argument(
        "-t",
        "--tokenizer",
        choices=[kind.value for kind in TokenizerKind],
        help="default: trained on the corpus for pydoc, else GPT2BPETokenizer",
    )
    flags.add_argument(
        "-d", "--data-dir", default=os.environ.get("DATA_DIR") or "./data", help="root of the output (default: $DATA_DIR or ./data)"
    )
    flags.add_argument("-v", "--vocab-file", help="tokenizer.json, vocab.json, .model or name, as the tokenizer needs")
    flags.add_argument("-m", "--merge-file", help="merges.txt of GPT2BPETokenizer")
    flags.add_argument("-f", "--force-redownload", action="store_true", help="download and tokenise again")
    flags.add_argument("--vocab-size", type=int, help="train a BPE tokenizer of this size on the corpus (pydoc: 4096)")
    flags.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that tokenise (default: all cores)")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Prepare the corpus; 0, or the error's exit code."""
    given = parser().parse_args(argv)
    setup_logging()
    request = CorpusRequest(
        corpus=given.dataset,
        data_dir=Path(given.data_dir),
        tokenizer_type=TokenizerKind(given.tokenizer) if given.tokenizer else None,
        vocab_file=given.vocab_file,
        merge_file=given.merge_file,
        vocab_size=given.vocab_size,
        workers=given.workers,
        again=given.force_redownload,
    )
    try:
        done = prepare(request)
    except NeoXError as error:
        print(error.report(), file=sys.stderr)
        return error.exit_code
    verb = "wrote" if done.fresh else "already there:"
    print(f"{verb} {done.prefix}.bin and .idx: {done.documents} documents, {done.tokens} tokens ({done.seconds:.1f} s)")
    print(f'  "data_path": "{done.prefix}"')
    print(f'  "tokenizer_type": "{done.tokenizer.kind.value}"')
    if done.tokenizer.vocab_file:
        print(f'  "vocab_file": "{done.tokenizer.vocab_file}"')
    if done.tokenizer.merge_file:
        print(f'  "merge_file": "{done.tokenizer.merge_file}"')
    return 0


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=parser().format_help().removeprefix("usage: "), about="", ranks=False, keys=False))
