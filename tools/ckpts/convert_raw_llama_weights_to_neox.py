#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: LLaMA's weights as Meta publishes them (params.json, consolidated.NN.pth) as a NeoX checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.checkpoint.conversion.flags import SHARED, parser, shared  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402

ABOUT = "Writes raw LLaMA or Mistral weights as a checkpoint, a tensor at a time."
USAGE = f"""python tools/ckpts/convert_raw_llama_weights_to_neox.py --input_dir DIR --output_dir DIR [flags]

  --input_dir DIR         params.json and consolidated.NN.pth; or a folder with one of those in a sub-folder named --model_size
  --model_size NAME       name of that sub-folder (7B, 13B, mistral-7B-v0.1, ...); sizes are read from params.json.
                          tokenizer_only: copy the tokenizer and nothing else
  --output_dir DIR        gets global_step0, latest, tokenizer/ and neox_config.yml
  --num_output_shards N   tensor ranks (1)
  --pipeline_parallel     a file per layer, as a run with pipe_parallel_size >= 1 reads{SHARED}"""


def main(argv: list[str]) -> int:
    """Convert and say so."""
    flags = parser(USAGE)
    flags.add_argument("--input_dir", type=Path, required=True)
    flags.add_argument("--model_size")
    flags.add_argument("--output_dir", type=Path, required=True)
    flags.add_argument("--num_output_shards", type=int, default=1)
    flags.add_argument("--pipeline_parallel", action="store_true")
    given = flags.parse_args(argv)
    from megatron.checkpoint.conversion.build import to_neox
    from megatron.checkpoint.conversion.model import ToNeoX
    from megatron.checkpoint.conversion.output_folder import copy_tokenizer

    if given.model_size == "tokenizer_only":
        print(f"copied {', '.join(copy_tokenizer(given.input_dir, given.output_dir / 'tokenizer')) or 'nothing'}")
        return 0
    inside = given.input_dir / (given.model_size or "")
    request = ToNeoX(
        source=inside if inside.is_dir() else given.input_dir,
        out=given.output_dir,
        tensor=given.num_output_shards,
        pipe=1 if given.pipeline_parallel else 0,
        **shared(given),
    )
    print(to_neox(request))
    return 0


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT, ranks=False, keys=False))
