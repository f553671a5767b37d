#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Reports how long the samples of a data set are and which max_length suits them."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.atomic_io import atomic_path, write_durably  # noqa: E402
from megatron.data.inspect.lengths import (  # noqa: E402
    LIMITS,
    Lengths,
    Report,
    measure,  # noqa: E402
    read_lengths,
    summarise,
)
from megatron.data.preprocess import flags as shared  # noqa: E402
from megatron.data.preprocess.encoders import TextSource  # noqa: E402
from megatron.data.preprocess.inputs import find  # noqa: E402
from megatron.data.preprocess.sources import Files  # noqa: E402
from megatron.errors import DataError, NeoXError  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402
from megatron.tool_flags import ToolParser  # noqa: E402

ABOUT = """Lengths of a set of .bin/.idx files: percentiles, the share within usual limits, and the recommended max_length.

INPUT is a prefix, without .bin/.idx:
  P                      one sequence per sample, with P's labels where they lie beside it
  P of preference pairs  as given to --output-prefix: P_chosen_document and P_rejected_document, or P_lengths_document, are found
  CHOSEN --rejected R    pairs under any names
or files (JSON lines, Parquet, text..., folders and globs) with a tokenizer:
  FILES --tokenizer-path FOLDER     preference pairs, rendered with the folder's chat template
  FILES --tokenizer-type HFTokenizer --vocab-file tokenizer.json   plain texts"""


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = ToolParser(description=ABOUT, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("input", nargs="+", help="one or more; taken together as one set")
    flags.add_argument("--rejected", help="prefix of the rejected sequences; INPUT holds the chosen ones")
    add_records(flags)
    flags.add_argument("--coverage", type=float, default=0.95, help="share of samples that max_length must hold whole (default: 0.95)")
    flags.add_argument("--max-length", type=int, help="cut samples here (default: the recommended length)")
    flags.add_argument("--tokens-per-second", type=float, help="speed of all ranks together without padding, to report hours per epoch")
    flags.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there; - for stdout, without the tables")
    flags.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the lengths (png, pdf, svg)")
    return flags


def add_records(flags: argparse.ArgumentParser) -> None:
    """The flags of inputs that are not tokenized yet."""
    group = flags.add_argument_group("files of records")
    shared.add_tokenizer(group, required=False)
    group.add_argument("--tokenizer-path", help="folder of the tokenizer with a chat template, or a Hub name; for preference pairs")
    group.add_argument("--chat-template", help="Jinja file to use instead of the tokenizer's template")
    group.add_argument("--prompt-key", default="prompt", help="key of a pair's prompt; records may lack it (default: prompt)")
    group.add_argument("--jsonl-keys", nargs="+", help="key of the texts (default: text), or of both answers (default: chosen rejected)")
    group.add_argument("--split", help="of a folder saved with several splits")
    group.add_argument("--workers", type=int, default=1, help="processes; 1 uses all cores through the tokenizer's threads")
    group.add_argument("--skip-bad", type=int, default=0, metavar="N", help="leave out up to N malformed records instead of stopping")


def main(argv: list[str] | None = None) -> int:
    """Report; returns 0, or the error's exit code."""
    given = parser().parse_args(argv)
    try:
        for flag in ("max_length", "tokens_per_second"):
            if getattr(given, flag) is not None and getattr(given, flag) <= 0:
                raise DataError(f"--{flag.replace('_', '-')} {getattr(given, flag)} must be above 0", where="command line")
        if given.plot and given.plot.suffix not in (".png", ".pdf", ".svg"):
            raise DataError(f"--plot {given.plot} is not a picture", where="command line", fix="end its name in .png, .pdf or .svg")
        lengths, left_out = measured(given)
        report = summarise(lengths, coverage=given.coverage, max_length=given.max_length, tokens_per_second=given.tokens_per_second)
        told = json.dumps({"inputs": given.input, "left_out": dict(left_out), **report.as_dict()}, indent=1)
        if given.json and str(given.json) != "-":
            write_durably(given.json, told + "\n")
        if given.plot:
            draw(lengths, report, given.plot)
    except NeoXError as error:
        print(error.report(), file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    if str(given.json) == "-":
        print(told)
    else:
        for reason, count in left_out.items():
            print(f"left out: {count:,} records ({reason})")
        print_report(report)
    return 0


def measured(given: argparse.Namespace) -> tuple[Lengths, Counter[str]]:
    """The lengths of the input, and the records left out by reason."""
    if given.tokenizer_path is None and given.tokenizer_type is None:
        return read_lengths(given.input, rejected=given.rejected), Counter()
    if given.rejected or (given.tokenizer_path and given.tokenizer_type) or given.workers < 1:
        raise DataError(
            "these flags do not go together",
            where="command line",
            fix="files need --tokenizer-path (pairs) or --tokenizer-type (texts), not both; --rejected is for prefixes; --workers from 1",
        )
    files = find(given.input, split=given.split)
    if given.tokenizer_type:
        keys = tuple(given.jsonl_keys or ["text"])[:1]
        source = Files(files, columns=keys)
        chosen = shared.choose_tokenizer(given, source, keys)
        return measure(source, TextSource(chosen.source, True, keys), workers=given.workers, skip_bad=given.skip_bad)
    from megatron.data.chat.pairs import PairSource
    from megatron.data.chat.sources import chat_format

    keys = tuple(given.jsonl_keys or ["chosen", "rejected"])
    if len(keys) != 2:
        raise DataError("a pair has two answers", where="--jsonl-keys", fix="for instance --jsonl-keys chosen rejected")
    pairs = PairSource(chat_format(given.tokenizer_path, given.chat_template), given.prompt_key, *keys)
    return measure(Files(files, columns=(given.prompt_key, *keys)), pairs, workers=given.workers, skip_bad=given.skip_bad)


def print_report(report: Report) -> None:
    """The tables."""
    kind = "preference pairs" if report.pairs else "sequences"
    print(f"{report.samples:,} {kind}; lengths in tokens\n")
    names = ("mean", "median", "p90", "p95", "p99", "max")
    print(f"{'':<10}" + "".join(f"{name:>10}" for name in names))
    for name, column in report.columns.items():
        print(f"{name:<10}" + "".join(f"{column.lengths[key]:>10,.0f}" for key in names))
    print(f"\n{'share within':<24}" + "".join(f"{limit // 1024:>8}k" for limit in LIMITS))
    for name, column in report.columns.items():
        print(f"  {name:<22}" + shares(column.within))
    if report.prompt_exceeds is not None and report.nothing_trained is not None:
        print(f"{'prompt alone longer':<24}" + shares(report.prompt_exceeds))
        print(f"{'no trained token left':<24}" + shares(report.nothing_trained))
    print(f"\nrecommended max_length {report.recommended} (holds {report.coverage:.0%} of the samples whole)")
    print(f"tokens per epoch at max_length {report.max_length}: {report.tokens:,}")
    if report.hours is not None:
        print(f"hours/epoch without padding: {report.hours:.2f}")


def shares(by_limit: dict[int, float]) -> str:
    """One row of percentages."""
    return "".join(f"{100 * share:>8.1f}%" for share in by_limit.values())


def draw(lengths: Lengths, report: Report, output: Path) -> None:
    """Write the picture: a histogram of each column."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, above = pyplot.subplots(figsize=(8, 4), layout="constrained")
    columns = {name: values for name, values in lengths.columns.items() if name not in ("max", "total")}
    edges = np.geomspace(1, max(int(lengths.longest.max()), 2) + 1, 80)
    for name, values in columns.items():
        above.hist(np.maximum(values, 1), bins=edges, histtype="step", linewidth=2, label=name)
    above.axvline(report.max_length, color="black", linestyle="--", label=f"max_length {report.max_length}")
    above.set_xscale("log")
    above.set_xlabel("tokens")
    above.set_ylabel("samples")
    above.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as aside:
        figure.savefig(aside, format=output.suffix[1:], dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=parser().format_help().removeprefix("usage: "), about="", ranks=False, keys=False))
