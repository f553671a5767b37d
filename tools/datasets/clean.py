#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: cleans and de-duplicates text before it is tokenized, and reports what was dropped and why."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.data.cleaning.deduplication import Keep  # noqa: E402
from megatron.data.cleaning.filters import Filter  # noqa: E402
from megatron.data.cleaning.pii import Code  # noqa: E402
from megatron.data.cleaning.plan import CleaningSettings, Form, Identify, NearSettings  # noqa: E402
from megatron.data.cleaning.run import LocalTasks, OnSlurm, Runner, clean  # noqa: E402
from megatron.errors import ConfigError  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402
from megatron.tool_flags import ToolParser  # noqa: E402

ABOUT = "Cleans and de-duplicates JSON lines or Parquet: stages in the order below, those not named are off. See documentation/cleaning.md."
USAGE = """python tools/datasets/clean.py INPUT ... --output DIR [stages] [options]

  INPUT                       files, folders or patterns: .jsonl (.gz, .zst, .xz), .parquet
  --output DIR                new folder for the shards and report.json
  --text-key KEY              the field that holds the text (text); all other fields are kept
  --format F                  jsonl (default), jsonl.gz or parquet
  --skip-bad N                allow N records that cannot be read (0)
stages
  --normalise                 NFC, no control characters; with --ftfy also fixes text that was decoded wrongly
  --lang CODE ...             keep these languages; --lang-backend fasttext (default) or stopwords, --lang-threshold P (0.65)
  --url-key KEY               drop documents whose address, in this field, was met before
  --exact                     drop documents that are the same but for case and spaces
  --filters NAME,...          gopher, c4, fineweb
  --near minhash              drop near duplicates; --ngram 5 --bands 14 --rows 8 --keep longest|earliest,
                              --jaccard J checks each pair to be at least so alike
  --pii mask                  replace e-mail and IP addresses, telephone, IBAN and card numbers, keys and tokens;
                              code is left alone (--code: all of it is, --code-where KEY=VALUE ...: records with that) unless --pii-in-code
  --decontaminate PATH ...    drop what shares 13 words, or most runs of 8, with these tasks' texts (JSON lines, Parquet, text)
  --blocklist FILE            drop what holds a word, phrase or re:pattern of this file
running
  --workers N                 processes at work at once (one per processor); does not change the output
  --tasks N                   parts the input is divided into, and shards at most (8)
  --seed N                    of MinHash (1)
  --executor E                local (default), or slurm with --partition P --time T [--cpus 1] [--memory-gb 4] [--sbatch KEY=VALUE ...]
A run that was stopped goes on where it was when it is started again. An output that exists is never changed."""


def main(argv: list[str]) -> int:
    """Run, and print the table of what was dropped."""
    given = _flags().parse_args(argv)
    if given.executor == "slurm" and not (given.partition and given.time):
        raise ConfigError("Slurm jobs need a partition and a time", where="command line", fix="add --partition NAME --time HH:MM:SS")
    report = clean(given.inputs, given.output, _settings(given), _runner(given))
    if report is not None:
        print(_table(report))
        print(f"report: {given.output / 'report.json'}")
    return 0


def _flags() -> argparse.ArgumentParser:
    flags = ToolParser(allow_abbrev=False, add_help=False, usage=USAGE)
    flags.add_argument("inputs", nargs="+")
    flags.add_argument("--output", required=True, type=Path)
    flags.add_argument("--text-key", default="text")
    flags.add_argument("--format", choices=[form.value for form in Form], default=Form.JSONL.value)
    flags.add_argument("--skip-bad", type=int, default=0)
    flags.add_argument("--normalise", "--normalize", action="store_true")
    flags.add_argument("--ftfy", action="store_true")
    flags.add_argument("--lang", nargs="+", default=[])
    flags.add_argument("--lang-backend", choices=[one.value for one in Identify], default=Identify.FASTTEXT.value)
    flags.add_argument("--lang-threshold", type=float, default=0.65)
    flags.add_argument("--url-key")
    flags.add_argument("--exact", action="store_true")
    flags.add_argument("--filters", default="")
    flags.add_argument("--near", choices=["minhash"])
    flags.add_argument("--ngram", type=int, default=5)
    flags.add_argument("--bands", type=int, default=14)
    flags.add_argument("--rows", type=int, default=8)
    flags.add_argument("--jaccard", type=float)
    flags.add_argument("--keep", choices=[keep.value for keep in Keep], default=Keep.LONGEST.value)
    flags.add_argument("--pii", choices=["mask"])
    flags.add_argument("--code", action="store_true")
    flags.add_argument("--code-where", nargs="+", default=[], type=_pair)
    flags.add_argument("--pii-in-code", action="store_true")
    flags.add_argument("--decontaminate", nargs="+", default=[])
    flags.add_argument("--blocklist")
    flags.add_argument("--workers", type=int)
    flags.add_argument("--tasks", type=int, default=8)
    flags.add_argument("--seed", type=int, default=1)
    flags.add_argument("--executor", choices=["local", "slurm"], default="local")
    flags.add_argument("--partition")
    flags.add_argument("--time")
    flags.add_argument("--cpus", type=int, default=1)
    flags.add_argument("--memory-gb", type=int, default=4)
    flags.add_argument("--sbatch", nargs="+", default=[], type=_pair)
    return flags


def _pair(given: str) -> tuple[str, str]:
    key, sign, value = given.partition("=")
    if not sign or not key:
        raise argparse.ArgumentTypeError(f"{given!r} is not KEY=VALUE")
    return key, value


def _settings(given: argparse.Namespace) -> CleaningSettings:
    names = [name for name in given.filters.replace(",", " ").split() if name]
    known = [one.value for one in Filter]
    if unknown := sorted(set(names) - set(known)):
        raise ConfigError(f"no filters are called {', '.join(unknown)}", where="--filters", fix=f"known: {', '.join(known)}")
    if given.ftfy and not given.normalise:
        raise ConfigError("--ftfy is a part of the stage normalise, which is off", where="command line", fix="add --normalise")
    near = None
    if given.near:
        near = NearSettings(ngram=given.ngram, bands=given.bands, rows=given.rows, keep=Keep(given.keep), jaccard=given.jaccard)
    return CleaningSettings(
        text_key=given.text_key,
        normalise=given.normalise,
        ftfy=given.ftfy,
        languages=tuple(given.lang),
        identify=Identify(given.lang_backend),
        language_threshold=given.lang_threshold,
        url_key=given.url_key,
        exact=given.exact,
        filters=tuple(Filter(name) for name in names),
        near=near,
        pii=given.pii is not None,
        code=None if given.pii_in_code else Code(given.code, tuple(given.code_where)),
        decontaminate=tuple(given.decontaminate),
        blocklist=given.blocklist,
        form=Form(given.format),
        seed=given.seed,
        tasks=given.tasks,
        skip_bad=given.skip_bad,
    )


def _runner(given: argparse.Namespace) -> Runner:
    if given.executor == "local":
        workers = len(os.sched_getaffinity(0)) if given.workers is None else given.workers
        if workers < 1:
            raise ConfigError(f"--workers {workers} cannot be", where="command line", fix="1 or more")
        return LocalTasks(workers)
    root = Path(__file__).resolve().parents[2]
    binaries = Path(sys.executable).parent
    environment = f"export PATH={shlex.quote(str(binaries))}:$PATH PYTHONPATH={shlex.quote(str(root))}${{PYTHONPATH:+:$PYTHONPATH}}"
    return OnSlurm(
        {
            "partition": given.partition,
            "time": given.time,
            "workers": -1 if given.workers is None else given.workers,
            "cpus_per_task": given.cpus,
            "mem_per_cpu_gb": given.memory_gb,
            "sbatch_args": dict(given.sbatch),
            "env_command": environment,
        }
    )


def _table(report: dict[str, Any]) -> str:
    """Kept and dropped per stage and rule, one line each."""
    lines = [f"{'stage':<14}{'in':>12}{'out':>12}  dropped"]
    for stage in report["stages"]:
        reasons = ", ".join(f"{rule} {entry['count']}" for rule, entry in stage["dropped"].items())
        lines.append(f"{stage['stage']:<14}{stage['documents_in']:>12}{stage['documents_out']:>12}  {reasons}")
    came, left = report["input"], report["output"]
    lines.append(f"{'all':<14}{came['documents']:>12}{left['documents']:>12}  bad records {came['bad_records']['count']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT, ranks=False, keys=False))
