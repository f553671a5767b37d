#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: a Hugging Face model as a NeoX checkpoint for any number of tensor ranks and stages, with a configuration to train it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.checkpoint.conversion.flags import SHARED, parser, shared  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402

ABOUT = "Writes a Hugging Face model as a checkpoint and neox_config.yml, a tensor at a time, and proves it by its logits."
USAGE = f"""python tools/ckpts/convert_hf_to_neox.py --hf-model MODEL --output-dir DIR [flags]

  --hf-model MODEL   a folder, or an id on the Hugging Face hub
  --revision R       of the hub's model
  --output-dir DIR   gets global_step<N>, latest, tokenizer/ and neox_config.yml
  --tp N             tensor ranks, model_parallel_size (1)
  --pp N             pipeline stages, pipe_parallel_size (0: one file per tensor rank)
  --iteration N      number of the step (0)
  --precision P      auto (as in the model), fp16, bf16 or fp32
  --make-vocab-size-divisible-by N   rows of the vocabulary per tensor rank are a multiple of it (1){SHARED}"""


def main(argv: list[str]) -> int:
    """Convert and say so."""
    flags = parser(USAGE)
    flags.add_argument("--hf-model", required=True)
    flags.add_argument("--revision")
    flags.add_argument("--output-dir", type=Path, required=True)
    flags.add_argument("--tp", type=int, default=1)
    flags.add_argument("--pp", type=int, default=0)
    flags.add_argument("--iteration", type=int, default=0)
    flags.add_argument("--precision", choices=("auto", "fp16", "bf16", "fp32"), default="auto")
    flags.add_argument("--make-vocab-size-divisible-by", type=int, default=1)
    given = flags.parse_args(argv)
    from megatron.checkpoint.conversion.build import to_neox
    from megatron.checkpoint.conversion.flags import local_folder
    from megatron.checkpoint.conversion.model import Precision, ToNeoX

    request = ToNeoX(
        source=local_folder(given.hf_model, given.revision),
        out=given.output_dir,
        tensor=given.tp,
        pipe=given.pp,
        iteration=given.iteration,
        precision=Precision(given.precision),
        divisible_by=given.make_vocab_size_divisible_by,
        **shared(given),
    )
    print(to_neox(request))
    return 0


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT, ranks=False, keys=False))
