#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: a Hugging Face GPT-NeoX or Pythia model as a NeoX checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

from megatron.checkpoint.conversion.flags import SHARED, parser, shared  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402

ABOUT = "Writes a Hugging Face GPT-NeoX model as a checkpoint, a tensor at a time, and proves it by its logits."
USAGE = f"""python huggingface/convert_hf_gptneox_to_neox.py --hf-model MODEL [--output-dir DIR] [flags]

  --hf-model MODEL         a folder, or an id on the Hugging Face hub
  --revision R             of the hub's model
  --output-dir DIR         gets global_step<N>, latest, tokenizer/ and neox_config.yml;
                           without it, checkpoints/<the model's name without sfm->
  --tp N                   tensor ranks (1)
  --pp N                   pipeline stages (0: one file per tensor rank)
  --iteration N            number of the step (0)
  --precision P            auto (as in the model), fp16, bf16 or fp32
  --save-tokenizer         is always done
  --transformer-engine     the names of TransformerEngine's layers, for programs with te_mha and te_layernorm_mlp
  --no-transformer-engine  NeoX's names, which this project trains on; the default{SHARED}"""


def main(argv: list[str]) -> int:
    """Convert and say so."""
    flags = parser(USAGE)
    flags.add_argument("--hf-model", required=True)
    flags.add_argument("--revision")
    flags.add_argument("--output-dir", type=Path)
    flags.add_argument("--tp", type=int, default=1)
    flags.add_argument("--pp", type=int, default=0)
    flags.add_argument("--iteration", type=int, default=0)
    flags.add_argument("--precision", choices=("auto", "fp16", "bf16", "fp32"), default="auto")
    flags.add_argument("--save-tokenizer", action="store_true")
    flags.add_argument("--transformer-engine", action="store_true")
    flags.add_argument("--no-transformer-engine", dest="transformer_engine", action="store_false")
    given = flags.parse_args(argv)
    from megatron.checkpoint.conversion.build import to_neox
    from megatron.checkpoint.conversion.flags import local_folder
    from megatron.checkpoint.conversion.model import Precision, ToNeoX

    name = Path(given.hf_model).name.removeprefix("sfm-")
    request = ToNeoX(
        source=local_folder(given.hf_model, given.revision),
        out=given.output_dir or Path("checkpoints") / name,
        tensor=given.tp,
        pipe=given.pp,
        iteration=given.iteration,
        precision=Precision(given.precision),
        dialect="neox_te" if given.transformer_engine else None,
        **shared(given),
    )
    print(to_neox(request))
    return 0


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT, ranks=False, keys=False))
