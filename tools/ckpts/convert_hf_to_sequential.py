#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: a Pythia checkpoint of the Hugging Face hub as a NeoX checkpoint without a pipeline, with the flags of GPT-NeoX's tool."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.checkpoint.conversion.flags import SHARED, parser, shared  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402

ABOUT = "Writes a revision of a Hugging Face model as a checkpoint with all weights in one file per tensor rank."
USAGE = f"""python tools/ckpts/convert_hf_to_sequential.py --hf-model-name NAME --output-dir DIR [flags]

  --hf-model-name NAME   pythia-160m and so on, of EleutherAI; a whole id; or a folder
  --revision STEP        143000 and so on: the revision step<STEP> (of EleutherAI's models); other words as they are
  --output-dir DIR       gets global_step<STEP>, latest, tokenizer/ and neox_config.yml
  --config FILE ...      of the run to come: model_parallel_size is taken from it
  --cache-dir DIR        where downloads are kept (what the hub's library uses)
  --download-only        download and end
  --test                 compare logits whatever the size, as --verify does
  --ckpt-tmp-dir DIR     not needed any more{SHARED}"""


def main(argv: list[str]) -> int:
    """Convert and say so."""
    flags = parser(USAGE)
    flags.add_argument("--hf-model-name", required=True)
    flags.add_argument("--revision", default="143000")
    flags.add_argument("--output-dir", type=Path)
    flags.add_argument("--config", nargs="*", default=[])
    flags.add_argument("--cache-dir")
    flags.add_argument("--download-only", action="store_true")
    flags.add_argument("--test", action="store_true")
    flags.add_argument("--ckpt-tmp-dir")
    given = flags.parse_args(argv)
    from megatron.checkpoint.conversion.build import to_neox
    from megatron.checkpoint.conversion.flags import local_folder
    from megatron.checkpoint.conversion.model import ToNeoX
    from megatron.errors import ConfigError
    from megatron.neox_arguments.yaml_loader import read_files

    local, step = Path(given.hf_model_name).is_dir(), given.revision
    name = given.hf_model_name if local or "/" in given.hf_model_name else f"EleutherAI/{given.hf_model_name}"
    revision = None if local else f"step{step}" if step.isdecimal() else step
    folder = local_folder(name, revision, given.cache_dir)
    if given.download_only:
        print(f"{name} is in {folder}")
        return 0
    if given.output_dir is None:
        raise ConfigError("no output folder is named", where="command line", fix="--output-dir DIR")
    tensor = read_files(given.config).values.get("model_parallel_size", 1) if given.config else 1
    number = int(step) if step.isdecimal() else 0
    verify = {**shared(given), **({"verify": True} if given.test else {})}
    print(to_neox(ToNeoX(source=folder, out=given.output_dir, tensor=tensor, iteration=number, **verify)))
    return 0


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT, ranks=False, keys=False))
