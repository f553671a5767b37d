#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: tells how long the samples of a set are, which max_length suits them, and what each way of making batches wastes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.data.inspect.lengths import LIMITS, Lengths, Report, read_lengths, summarise  # noqa: E402
from megatron.data.inspect.measuring import measure  # noqa: E402
from megatron.data.inspect.padding import Setup  # noqa: E402
from megatron.data.preprocess import flags as shared  # noqa: E402
from megatron.data.preprocess.encoders import TextSource  # noqa: E402
from megatron.data.preprocess.inputs import find  # noqa: E402
from megatron.data.preprocess.sources import Files  # noqa: E402
from megatron.errors import DataError, NeoXError  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402
from megatron.tool_flags import ToolParser  # noqa: E402

ABOUT = """Lengths of a set of .bin/.idx files: percentiles, coverage, the recommended max_length, and the expected waste per batch mode.

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
    flags.add_argument("--gpus", type=int, default=4, help="data-parallel ranks (default: 4)")
    flags.add_argument("--batch", type=int, default=128, help="samples (pairs) per step on all ranks (default: 128)")
    flags.add_argument("--micro-batch", type=int, default=4, help="samples (pairs) per rank and micro-step (default: 4)")
    flags.add_argument("--capacity", type=int, help="tokens per rank and micro-step of packed batches (default: fitted to the set)")
    flags.add_argument("--tokens-per-second", type=float, help="speed of all ranks together without padding, to tell hours per epoch")
    flags.add_argument("--seed", type=int, default=0, help="of the simulated batches (default: 0)")
    flags.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there; - for stdout, without the tables")
    flags.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the lengths and the waste (png, pdf, svg)")
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
    """Tell; 0, or the error's exit code."""
    given = parser().parse_args(argv)
    try:
        for flag in ("max_length", "tokens_per_second"):
            if getattr(given, flag) is not None and getattr(given, flag) <= 0:
                raise DataError(f"--{flag.replace('_', '-')} {getattr(given, flag)} is not above 0", where="command line")
        if given.plot and given.plot.suffix not in (".png", ".pdf", ".svg"):
            raise DataError(f"--plot {given.plot} is no picture", where="command line", fix="end its name in .png, .pdf or .svg")
        lengths, left_out = measured(given)
        setup = Setup(ranks=given.gpus, batch=given.batch, micro=given.micro_batch, capacity=given.capacity, seed=given.seed)
        report = summarise(lengths, setup, coverage=given.coverage, max_length=given.max_length, tokens_per_second=given.tokens_per_second)
        told = json.dumps({"inputs": given.input, "left_out": dict(left_out), **report.as_dict()}, indent=1)
        if given.json and str(given.json) != "-":
            aside = given.json.with_name(f"{given.json.name}.tmp.{os.getpid()}")
            aside.write_text(told + "\n", encoding="utf-8")
            aside.replace(given.json)
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
        print_report(report, setup)
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


def print_report(report: Report, setup: Setup) -> None:
    """The tables."""
    kind = "preference pairs" if report.pairs else "sequences"
    print(f"{report.samples:,} {kind}; lengths in tokens\n")
    names = ("mean", "median", "p90", "p95", "p99", "max")
    print(f"{'':<10}" + "".join(f"{name:>10}" for name in names) + "   lognormal fit")
    for name, column in report.columns.items():
        shape = f"mu {column.fit.mu:.3f} sigma {column.fit.sigma:.3f} (off by {column.fit.gap:.3f})" if column.fit else "-"
        print(f"{name:<10}" + "".join(f"{column.lengths[key]:>10,.0f}" for key in names) + f"   {shape}")
    print(f"\n{'share within':<24}" + "".join(f"{limit // 1024:>8}k" for limit in LIMITS))
    for name, column in report.columns.items():
        print(f"  {name:<22}" + shares(column.within))
    if report.prompt_exceeds is not None and report.nothing_trained is not None:
        print(f"{'prompt alone longer':<24}" + shares(report.prompt_exceeds))
        print(f"{'no trained token left':<24}" + shares(report.nothing_trained))
    print(f"\nrecommended max_length {report.recommended} (holds {report.coverage:.0%} of the samples whole)")
    print(f"tokens per epoch at max_length {report.max_length}: {report.tokens:,}")
    print(f"\n{setup.ranks} GPUs, {setup.batch} samples per step, {setup.micro} per micro-batch, max_length {report.max_length}:")
    hours = "" if report.hours is None else f"{'hours/epoch':>13}"
    print(f"{'batches':<28}{'real/computed':>14}{'time':>8}{'ZeRO-3':>8}{'steps':>7}{'peak tokens':>13}{hours}")
    for mode in report.modes:
        spent = "" if report.hours is None else f"{report.hours * mode.time:>13.2f}"
        print(
            f"{mode.name:<28}{mode.utilisation:>14.3f}{mode.time:>8.2f}{mode.time_each:>8.2f}{mode.micro_steps:>7.1f}{mode.peak:>13,}{spent}"
        )
    print("time: multiple of the time without padding and waiting (ZeRO-1/2; ZeRO-3 and FSDP wait every micro-step)")


def shares(by_limit: dict[int, float]) -> str:
    """One row of percentages."""
    return "".join(f"{100 * share:>8.1f}%" for share in by_limit.values())


def draw(lengths: Lengths, report: Report, output: Path) -> None:
    """Write the picture, aside first: a histogram of each column, and what each mode makes of it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 8), layout="constrained")
    columns = {name: values for name, values in lengths.columns.items() if name not in ("max", "total")}
    edges = np.geomspace(1, max(int(lengths.longest.max()), 2) + 1, 80)
    for name, values in columns.items():
        above.hist(np.maximum(values, 1), bins=edges, histtype="step", linewidth=2, label=name)
    above.axvline(report.max_length, color="black", linestyle="--", label=f"max_length {report.max_length}")
    above.set_xscale("log")
    above.set_xlabel("tokens")
    above.set_ylabel("samples")
    above.legend()
    places = np.arange(len(report.modes))[::-1]
    for shift, label, values in (
        (0.2, "real / computed tokens", [mode.utilisation for mode in report.modes]),
        (-0.2, "time without waste / time", [1 / mode.time for mode in report.modes]),
    ):
        below.bar_label(below.barh(places + shift, values, height=0.4, label=label), fmt="%.2f", padding=3)
    below.set_yticks(places, [mode.name for mode in report.modes])
    below.set_xlim(0, 1.4)
    below.legend(loc="upper right")
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f"{output.name}.tmp.{os.getpid()}")
    figure.savefig(aside, format=output.suffix[1:], dpi=120)
    aside.replace(output)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=parser().format_help().removeprefix("usage: "), about="", ranks=False, keys=False))
