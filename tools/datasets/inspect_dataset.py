#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: shows what a `.bin/.idx` pair holds: statistics, documents with their masks, and whether labels fit the tokens."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.data.inspect.inspecting import Agreement, DatasetStatistics, Pair, compare, labels_beside, statistics  # noqa: E402
from megatron.data.legacy_dataset import open_any  # noqa: E402
from megatron.errors import DataError, ExitStatus, NeoXError  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402
from megatron.tokenizer import Tokenizer, TokenizerKind, TokenizerSource, open_tokenizer  # noqa: E402
from megatron.tool_flags import ToolParser  # noqa: E402

DIM, TRAINED, RESET = "\033[2m", "\033[32m", "\033[0m"
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that a terminal would obey."""


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = ToolParser(
        description="Show statistics and documents of a .bin/.idx pair, and check its labels. Exit status 77 where they do not fit.",
        allow_abbrev=False,
    )
    flags.add_argument("prefix", help="path of the tokens, without .bin/.idx")
    flags.add_argument("--labels", help="prefix of the labels, or 'none' (default: the label files beside the tokens, told by their names)")
    flags.add_argument("--samples", type=int, default=1, help="how many documents are shown (default: 1)")
    flags.add_argument("--start", type=int, default=0, help="number of the first document shown (default: 0)")
    flags.add_argument("--random", type=int, metavar="SEED", help="show documents drawn at random instead")
    flags.add_argument("--max-tokens", type=int, default=512, help="of a longer document, show this many tokens (default: 512)")
    flags.add_argument("--ids", action="store_true", help="show ids even where a tokenizer is given")
    flags.add_argument("--tokenizer-type", choices=[kind.value for kind in TokenizerKind], help="default: ids are shown, not text")
    flags.add_argument("--vocab-file", help="tokenizer.json, vocab.json, .model or name, as the tokenizer needs")
    flags.add_argument("--merge-file", help="merges.txt of GPT2BPETokenizer")
    flags.add_argument("--eod", type=int, help="id that ends a document (default: the tokenizer's)")
    flags.add_argument("--color", choices=["auto", "always", "never"], default="auto", help="auto: on a terminal, unless NO_COLOR is set")
    flags.add_argument("--json", action="store_true", help="print one JSON object instead")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Show; 0, 77 where labels do not fit, or the error's exit code."""
    given = parser().parse_args(argv)
    try:
        return show(given)
    except NeoXError as error:
        print(error.report(), file=sys.stderr)
        return error.exit_code


def show(given: argparse.Namespace) -> int:
    """Open, count, compare, print."""
    tokens = open_any(given.prefix)
    beside = labels_beside(given.prefix) if given.labels is None else None if given.labels == "none" else given.labels
    labels = open_any(beside) if beside else None
    tokenizer = open_given(given)
    eod = given.eod if given.eod is not None else tokenizer.eod if tokenizer else None
    counted = statistics(tokens, labels, vocab_size=tokenizer.vocab_size if tokenizer else None, eod=eod)
    agreement = compare(tokens, labels) if labels is not None else None
    numbers = chosen(given, len(tokens))
    bad = agreement is not None and not agreement.ok
    masks = labels if labels is not None and not bad else None
    decoder = None if given.ids else tokenizer
    if given.json:
        shown = [{"document": number, **spans_json(tokens, masks, number, decoder, given.max_tokens)} for number in numbers]
        report = {"prefix": given.prefix, "labels": beside, "vocab_size": tokenizer.vocab_size if tokenizer else None}
        check = {"ok": agreement.ok, **asdict(agreement)} if agreement else None
        print(json.dumps({**report, "statistics": asdict(counted), "check": check, "samples": shown}))
    else:
        print_statistics(given.prefix, counted, tokenizer)
        if agreement is not None:
            print_agreement(str(beside), agreement)
        coloured = given.color == "always" or (given.color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
        for number in numbers:
            print_document(tokens, masks, number, decoder, limit=given.max_tokens, coloured=coloured)
    return ExitStatus.BAD_INPUT if bad else 0


def open_given(given: argparse.Namespace) -> Tokenizer | None:
    """The tokenizer asked for; a vocabulary alone is taken for a tokenizer.json."""
    if given.tokenizer_type is None and given.vocab_file is None:
        return None
    kind = TokenizerKind(given.tokenizer_type) if given.tokenizer_type else TokenizerKind.HF
    return open_tokenizer(TokenizerSource(kind, given.vocab_file, given.merge_file))


def chosen(given: argparse.Namespace, documents: int) -> list[int]:
    """Numbers of the documents to show."""
    if given.samples < 0 or given.max_tokens < 1 or not 0 <= given.start <= documents:
        raise DataError(
            f"--samples {given.samples} --start {given.start} --max-tokens {given.max_tokens}: no such documents ({documents} are there)",
            where="command line",
            fix="count documents from 0",
        )
    if given.random is None:
        return list(range(given.start, min(given.start + given.samples, documents)))
    drawn = np.random.default_rng(given.random).permutation(documents)[: given.samples]
    return sorted(int(number) for number in drawn)


def spans(tokens: Pair, labels: Pair | None, number: int, limit: int) -> list[tuple[bool | None, list[int | float]]]:
    """One document in runs of (trained or not, values); None where nothing tells. A file of labels tells for itself."""
    start = int(tokens.sizes[:number].sum(dtype=np.int64))
    stop = start + min(int(tokens.sizes[number]), limit)
    values = tokens.values[start:stop]
    told = labels.values[start:stop] if labels is not None else values
    if labels is None and (tokens.dtype.kind == "f" or not (values < 0).any()):
        return [(None, values.tolist())] if len(values) else []
    trained = told >= 0
    cuts = np.flatnonzero(np.diff(trained)) + 1
    return [(bool(t[0]), v.tolist()) for t, v in zip(np.split(trained, cuts), np.split(values, cuts), strict=True) if len(v)]


def text_of(values: list[int | float], tokenizer: Tokenizer | None) -> str:
    """Values as text: decoded where there is a tokenizer that knows them all."""
    if values and set(values) == {-100}:
        return f"({len(values)} x -100)"
    if tokenizer is None or any(not isinstance(value, int) or not 0 <= value < tokenizer.vocab_size for value in values):
        return " ".join(map(str, values))
    return tokenizer.decode(values)  # type: ignore[arg-type]


def spans_json(tokens: Pair, labels: Pair | None, number: int, tokenizer: Tokenizer | None, limit: int) -> dict[str, Any]:
    """One document for JSON."""
    parts = [{"trained": on, "ids": values, "text": text_of(values, tokenizer)} for on, values in spans(tokens, labels, number, limit)]
    return {"length": int(tokens.sizes[number]), "spans": parts if tokenizer else [{k: p[k] for k in ("trained", "ids")} for p in parts]}


def print_document(tokens: Pair, labels: Pair | None, number: int, tokenizer: Tokenizer | None, *, limit: int, coloured: bool) -> None:
    """One document: what is not trained is dimmed, or stands in [[ ]] where there is no colour."""
    size = int(tokens.sizes[number])
    pieces = []
    for trained, values in spans(tokens, labels, number, limit):
        text = CONTROLS.sub(lambda found: f"\\x{ord(found.group()):02x}", text_of(values, tokenizer))
        if trained is False:
            pieces.append(f"{DIM}{text}{RESET}" if coloured else f"[[{text}]]")
        else:
            pieces.append(f"{TRAINED}{text}{RESET}" if coloured and trained else text)
    legend = "" if all(not piece.startswith("[[") for piece in pieces) else ", [[not trained]]"
    print(f"\n--- document {number} ({size} tokens{legend})")
    print(("" if tokenizer else " ").join(pieces) + (f" ... ({size - limit} more)" if size > limit else ""))


def print_statistics(prefix: str, counted: DatasetStatistics, tokenizer: Tokenizer | None) -> None:
    """The table."""
    rows: list[tuple[str, str]] = [("documents", f"{counted.documents:,}")]
    if counted.marked is not None:
        rows.append(("by the file's marks", f"{counted.marked:,} documents (training takes each sequence for one)"))
    rows += [("tokens", f"{counted.values:,} ({counted.dtype})"), ("empty documents", f"{counted.empty:,}")]
    if counted.lengths:
        rows.append(("length", "  ".join(f"{name} {value:,.0f}" for name, value in counted.lengths.items())))
    if counted.largest is not None:
        known = f", vocabulary {tokenizer.vocab_size:,}" if tokenizer else ""
        rows.append(("smallest, largest", f"{counted.smallest:,}, {counted.largest:,}{known}"))
    if counted.outside:
        rows.append(("OUTSIDE VOCABULARY", f"{counted.outside:,} values: made with another tokenizer?"))
    if counted.eod_values is not None and counted.eod_ends is not None:
        share = percent(counted.eod_ends, counted.documents)
        rows.append(("end of document", f"{counted.eod_values:,} ids; {share} of the documents end in one"))
    if counted.trained is not None:
        rows.append(("trained", f"{percent(counted.trained, counted.values)} of the tokens; {counted.untrained:,} documents without any"))
    print(prefix)
    for name, value in rows:
        print(f"  {name:<20} {value}")


def print_agreement(prefix: str, agreement: Agreement) -> None:
    """What the comparison found."""
    print(f"  {'labels':<20} {prefix}: {'fit the tokens' if agreement.ok else 'DO NOT FIT THE TOKENS'}")
    for problem in agreement.problems:
        print(f"    {problem}")
    for place in agreement.first:
        print(f"    document {place.document}, position {place.position}: token {place.token}, label {place.label}")
    if agreement.differing > len(agreement.first):
        print(f"    ... {agreement.differing:,} differing places in all")


def percent(part: int, whole: int) -> str:
    """`part` of `whole` as a percentage."""
    return f"{100 * part / whole:.1f}%" if whole else "-"


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=parser().format_help().removeprefix("usage: "), about="", ranks=False, keys=False))
