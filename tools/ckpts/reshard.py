#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: rewrites a checkpoint, optimizer included, for other numbers of tensor ranks and pipeline stages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.errors import ConfigError  # noqa: E402
from megatron.neox_arguments import NeoXArgs  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402
from megatron.tool_flags import ToolParser  # noqa: E402

ABOUT = """Rewrites a checkpoint for another layout, piece by piece, in little memory. Training does the same when it resumes; this is for
files that other programs read, and for many resumes at one layout."""
USAGE = """python tools/ckpts/reshard.py SOURCE TARGET --tensor N --pipe M [--iteration I] [--config FILE ...]

  SOURCE         what a run saved to, or one global_step<I> folder in it
  TARGET         where global_step<I> and latest are written
  --tensor N     tensor ranks (model_parallel_size)
  --pipe M       pipeline stages (pipe_parallel_size); 0 = all weights in one file per tensor rank
  --iteration I  the step; else the one that latest names
  --config FILE  the run's configuration, where the checkpoint holds no copy in configs/"""


def main(argv: list[str]) -> int:
    """Write the new checkpoint and say where."""
    flags = ToolParser(allow_abbrev=False, add_help=False, usage=USAGE)
    flags.add_argument("source", type=Path)
    flags.add_argument("target", type=Path)
    flags.add_argument("--tensor", type=int, required=True)
    flags.add_argument("--pipe", type=int, required=True)
    flags.add_argument("--iteration", type=int)
    flags.add_argument("--config", nargs="+", type=Path, default=[])
    given = flags.parse_args(argv)
    if given.tensor < 1 or given.pipe < 0:
        raise ConfigError(
            f"--tensor {given.tensor} --pipe {given.pipe} is no layout", where="command line", fix="--tensor >= 1, --pipe >= 0"
        )
    from megatron.checkpoint.loading.reshard import Target, reshard
    from megatron.checkpoint.steps.step_dirs import find_tag, named_step

    directory, iteration = named_step(given.source.resolve(), given.iteration)
    folder = directory / find_tag(directory, iteration)
    written = reshard(folder, given.target.resolve(), spec_of(folder, given.config), Target(tensor=given.tensor, pipe=given.pipe))
    print(f"wrote {written}: {given.tensor} tensor ranks, " + (f"{given.pipe} stages" if given.pipe else "no pipeline"))
    return 0


def spec_of(folder: Path, configs: list[Path]) -> Any:
    """The model that the checkpoint is of, from the configuration kept with it."""
    from megatron.checkpoint.build import spec_for
    from megatron.checkpoint.loading.merge_tp import read_shards, width_over
    from megatron.checkpoint.steps.manifest import read_manifest

    files = configs or sorted((folder / "configs").glob("*"))
    manifest = read_manifest(folder)
    if not files and not (manifest and manifest.config):
        raise ConfigError("the checkpoint holds no configuration", where=str(folder / "configs"), fix="name it: --config FILE ...")
    args = NeoXArgs.from_ymls([str(file) for file in files]) if files else NeoXArgs.from_dict(dict(manifest.config))
    return spec_for(args.replace(padded_vocab_size=width_over(read_shards(folder), "word_embeddings.weight", 0)), folder)


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT, keys=False))
