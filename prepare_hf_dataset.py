#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: a dataset of the Hugging Face Hub, or local files, into .bin/.idx files for training."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from megatron.data.hf.pipeline import PreparedDataset, prepare
from megatron.data.hf.request import As, Columns, Data, PrepareRequest, Tokens, default_folder
from megatron.data.preprocess.flags import add_backend
from megatron.errors import ConfigError
from megatron.neox_arguments.cli import run_face
from megatron.tokenizer import TokenizerBackend
from megatron.tool_flags import ToolParser

ABOUT = """Loads a dataset, finds its columns, counts its tokens, exports dataset.jsonl and writes <dir>_<stream>_document.bin and .idx.
A column `text` becomes plain text; `messages` become conversations with labels, so that only answers are trained; chosen and rejected
become pairs. A stage that was done with the same data and settings is not done again. Local files need no network."""
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = ToolParser(prog="prepare_hf_dataset.py", description=ABOUT, add_help=False, allow_abbrev=False)
    group = flags.add_argument_group("dataset")
    group.add_argument("--dataset", required=True, help="ORG/NAME on the Hub, or a file or folder here")
    group.add_argument("--subset", help="configuration of the dataset")
    group.add_argument("--split", default="train", help="(default: train)")
    group.add_argument("--data-dir", help="folder inside the dataset")
    group.add_argument("--data-files", nargs="+", default=[], help="files here, or files and globs inside the dataset")
    group.add_argument("--revision", help="branch, tag or commit")
    group = flags.add_argument_group("columns")
    group.add_argument("--as", dest="wanted", choices=[kind.value for kind in As], help="what the records become (default: as they look)")
    group.add_argument("--text-column", help="column to use (default: text, then messages, conversations, conversation)")
    group.add_argument("--join-columns", metavar="A,B", help="columns whose texts are joined by a blank line")
    group.add_argument("--midtrain-chat-messages", action="store_true", help="as --as midtrain: contents of the turns as text, no roles")
    group.add_argument("--skip-chat-template", action="store_true", help="turns as Python writes them; rarely what is wanted")
    group = flags.add_argument_group("tokenizer")
    group.add_argument("--tokenizer", help="tokenizer.json, folder or Hub name, for ids and chat template")
    group.add_argument("--vocab-file", help="the same, for ids")
    group.add_argument("--hf-tokenizer", help="the same, for the chat template")
    group.add_argument("--chat-template", help="Jinja file instead of the tokenizer's template")
    group.add_argument("--max-length", type=int, help="tokens of a sample: longer documents are counted, those it leaves untrained dropped")
    add_backend(group)
    group = flags.add_argument_group("stages")
    group.add_argument("--count-only", action="store_true", help="count documents and tokens, write nothing")
    group.add_argument("--skip-count", action="store_true", help="do not count where nothing is tokenized")
    group.add_argument("--skip-tokenize", action="store_true", help="export only")
    group.add_argument("--no-jsonl", action="store_true", help="do not write dataset.jsonl")
    group = flags.add_argument_group("output")
    group.add_argument("--output-dir", help="(default: <output-base>/<name>[_<subset>]_<split>)")
    group.add_argument("--output-base", default="./data", help="(default: ./data)")
    group.add_argument("--skip-bad", type=int, default=0, metavar="N", help="leave out up to N unusable records instead of stopping")
    group = flags.add_argument_group("work")
    group.add_argument("--num-proc", type=int, default=min(16, CORES), help="processes (default: the cores, 16 at most)")
    group.add_argument("--tokenize-workers", type=int, help="(default: --num-proc)")
    group.add_argument("--download-workers", type=int, help="(default: --num-proc)")
    group.add_argument("--batch-size", type=int, default=10_000, help="rows read from the Hub's files at once (default: 10000)")
    return flags


def request_of(given: argparse.Namespace) -> PrepareRequest:
    """What the flags ask for."""
    wanted = As(given.wanted) if given.wanted else None
    if given.midtrain_chat_messages:
        if wanted not in (None, As.MIDTRAIN):
            raise ConfigError("--midtrain-chat-messages is --as midtrain", where="command line", fix="leave one of them out")
        wanted = As.MIDTRAIN
    data = Data(
        dataset=given.dataset,
        subset=given.subset,
        split=given.split,
        data_dir=given.data_dir,
        data_files=tuple(part for name in given.data_files for part in ([name] if Path(name).exists() else name.split(","))),
        revision=given.revision,
    )
    folder = Path(given.output_dir).expanduser() if given.output_dir else default_folder(Path(given.output_base).expanduser(), data)
    return PrepareRequest(
        data=data,
        columns=Columns(
            wanted=wanted,
            text_column=given.text_column,
            join_columns=tuple(name.strip() for name in (given.join_columns or "").split(",") if name.strip()),
            as_written=given.skip_chat_template,
        ),
        tokens=Tokens(
            tokenizer=given.tokenizer or given.vocab_file,
            template_of=given.tokenizer or given.hf_tokenizer,
            template=given.chat_template,
            backend=TokenizerBackend(given.tokenizer_backend),
            max_length=given.max_length,
        ),
        folder=folder if folder.name not in ("", "..") else folder.resolve(),
        count=not given.skip_count,
        export=not given.no_jsonl,
        tokenize=not given.skip_tokenize,
        count_only=given.count_only,
        workers=given.tokenize_workers or given.num_proc,
        download_workers=given.download_workers or given.num_proc,
        batch_rows=given.batch_size,
        skip_bad=given.skip_bad,
    )


def report(done: PreparedDataset, *, writes: bool) -> str:
    """The results for a person, and the lines for the configuration."""
    found = done.results
    lines = [] if done.fresh else ["nothing to do: all of this was done before with the same data and settings"]
    lines += [f"first {stream}, what is trained in [[ ]]:\n{text}\n" for stream, text in (found.get("preview") or {}).items()]
    lines.append(f"{found['form']} (columns {found['text_column']})")
    if found.get("token_count") is not None:
        lines.append(f"{found['num_documents']} documents, {found['token_count']} tokens, {found['tokens_per_doc']} tokens per document")
    if found.get("trained_tokens") is not None:
        lines.append(f"trained: {found['trained_tokens']} tokens")
    lines += [f"left out {number} ({reason})" for reason, number in (found.get("dropped") or {}).items()]
    if found.get("bad_records"):
        lines.append(f"left out {found['bad_records']} that cannot be used")
        lines += [f"  {where}: {why}" for where, why in found["first_bad"]]
    lines += [f"{number} {note}" for note, number in (found.get("notes") or {}).items()]
    lines += ["times: " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in found["stage_times"].items())]
    if writes:
        lines.append(f"results in {found['output_dir']}")
    lines += [f'  "{key}": {json.dumps(paths)},' for key, paths in (found.get("paths") or {}).items()]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run the stages; print what came of them."""
    request = request_of(parser().parse_args(argv))
    print(report(prepare(request), writes=not request.count_only))
    print("status: completed")
    return 0


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=parser().format_help().removeprefix("usage: "), about="", ranks=False, keys=False))
