# SPDX-License-Identifier: Apache-2.0
"""The command-line flags that the tools which write datasets share, and what they come to."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.data.preprocess.blocks import RecordSource, first_texts
from megatron.data.preprocess.encoding_pool import usable_cores
from megatron.data.preprocess.inputs import KNOWN
from megatron.data.preprocess.writer import Options, WrittenDataset
from megatron.errors import ConfigError
from megatron.log import get_logger
from megatron.tokenizer import Tokenizer, TokenizerBackend, TokenizerKind, TokenizerSource, select_backend, set_library_threads

log = get_logger(__name__)


def add_input(flags: argparse.ArgumentParser, *, keys: list[str]) -> None:
    """--input, --jsonl-keys, --split, --num-docs."""
    group = flags.add_argument_group("input")
    group.add_argument(
        "--input",
        required=True,
        nargs="+",
        help=f"files, folders or globs, separated by commas or blanks; endings {' '.join(KNOWN)}",
    )
    group.add_argument(
        "--jsonl-keys", nargs="+", default=keys, help=f"keys (columns) to write, one dataset each (default: {' '.join(keys)})"
    )
    group.add_argument("--split", help="of a folder saved with several splits")
    group.add_argument("--num-docs", type=int, help="documents expected, for progress only")


def add_output(flags: argparse.ArgumentParser) -> None:
    """--output-prefix, --dataset-impl, --workers, --log-interval, --skip-bad."""
    group = flags.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, help="files are <prefix>_<key>_document.bin and .idx")
    group.add_argument("--dataset-impl", default="mmap", choices=["mmap", "lazy", "cached"], help="mmap is the format of training")
    group.add_argument("--workers", type=int, default=1, help="processes; 1 uses all cores through the tokenizer's threads")
    group.add_argument("--log-interval", type=int, default=100, help="documents between two lines of progress at least")
    group.add_argument("--skip-bad", type=int, default=0, metavar="N", help="leave out up to N malformed records instead of stopping")


def add_tokenizer(flags: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--tokenizer-type, --vocab-file, --merge-file, --tokenizer-backend."""
    group = flags.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-type", required=required, choices=[kind.value for kind in TokenizerKind])
    group.add_argument("--vocab-file", help="tokenizer.json, vocab.json, .model or name, as the tokenizer needs")
    group.add_argument("--merge-file", help="merges.txt of GPT2BPETokenizer")
    add_backend(group)


def add_backend(flags: Any) -> None:
    """--tokenizer-backend."""
    flags.add_argument(
        "--tokenizer-backend",
        default=TokenizerBackend.AUTO.value,
        choices=[backend.value for backend in TokenizerBackend],
        help="auto: gigatoken where it gives the same ids as tokenizers, else tokenizers (hf)",
    )


@dataclass(frozen=True)
class Chosen:
    """A tokenizer whose back end is settled.

    tokenizer: open already; None where other processes will encode, so that this one does not hold it
    about:     for the metadata
    """

    source: TokenizerSource
    tokenizer: Tokenizer | None
    about: dict[str, Any]


def choose_tokenizer(given: argparse.Namespace, source: RecordSource, keys: tuple[str, ...]) -> Chosen:
    """The tokenizer asked for, its back end settled on the first records of the input."""
    asked = TokenizerSource(
        TokenizerKind(given.tokenizer_type), given.vocab_file, given.merge_file, backend=TokenizerBackend(given.tokenizer_backend)
    )
    return choose(asked, first_texts(source, keys), workers=given.workers)


def choose(asked: TokenizerSource, texts: Sequence[str], *, workers: int) -> Chosen:
    """A tokenizer with its back end settled on `texts`."""
    if workers == 1:
        set_library_threads(usable_cores())  # before the first use
    settled, reason, tokenizer = select_backend(asked, texts)
    log.info("tokenizer back end: %s (%s)", settled.backend.value, reason)
    about = {
        "type": settled.kind.value,
        "vocab_file": settled.vocab_file,
        "merge_file": settled.merge_file,
        "backend": settled.backend.value,
        "digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
    }
    return Chosen(settled, tokenizer if workers == 1 else None, about)


def options(given: argparse.Namespace, **about: Any) -> Options:
    """How to write, and what the metadata says besides the counts."""
    if given.skip_bad < 0 or given.log_interval < 1:
        raise ConfigError("--skip-bad must be 0 or more, and --log-interval 1 or more", where="command line", fix="see --help")
    return Options(
        workers=given.workers,
        skip_bad=given.skip_bad,
        legacy=given.dataset_impl != "mmap",
        log_interval=given.log_interval,
        num_docs=given.num_docs,
        about={"command": shlex.join(sys.argv), "args": vars(given), **about},
    )


def prefix_of(given: argparse.Namespace) -> Path:
    """The output prefix; a folder is refused."""
    prefix = Path(given.output_prefix).expanduser()
    if given.output_prefix.endswith("/") or prefix.is_dir():
        raise ConfigError(f"{prefix} is a folder", where="--output-prefix", fix=f"add a name: {prefix / 'data'}")
    return prefix


def summary(written: WrittenDataset) -> str:
    """What was written and what was left out, for a person."""
    counts = written.counts
    lines = []
    for stream, prefix in written.files.items():
        lines.append(f"wrote {prefix}.bin and .idx: {written.documents[stream]} documents, {written.tokens[stream]} tokens")
    for reason, number in counts.dropped.items():
        where = [place for place, why in counts.first_dropped if why == reason]
        lines.append(f"left out {number} ({reason})" + (f", first at {', '.join(where)}" if where else ""))
    if counts.bad:
        lines.append(f"left out {counts.bad} that cannot be used" + "".join(f"\n  {where}: {why}" for where, why in counts.first_bad))
    lines += [f"{number} {note}" for note, number in counts.notes.items()]
    if counts.trained is not None:
        labelled = [tokens for stream, tokens in written.tokens.items() if stream == "label" or stream.endswith("_label")]
        lines.append(f"trained: {counts.trained} tokens, {100 * counts.trained / max(sum(labelled), 1):.1f} % of those with labels")
    speed = f", {counts.source_bytes / 1e6 / counts.seconds:.1f} MB/s" if counts.seconds > 0 and counts.source_bytes else ""
    lines.append(f"Total tokens: {next(iter(written.tokens.values()))} ({counts.seconds:.1f} s{speed})")
    return "\n".join(lines)
