#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: a Hugging Face LLaMA (or any model of a known architecture) as a NeoX checkpoint, with the flags of GPT-NeoX's tool."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.checkpoint.conversion.flags import SHARED, parser, shared  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402

ABOUT = "Writes a Hugging Face model as a checkpoint, with the flags of GPT-NeoX's converter of LLaMA."
USAGE = f"""python tools/ckpts/convert_hf_llama_to_neox.py --model MODEL --model_path DIR [--tp N] [--pp N] [flags]

  --model MODEL      a folder, or an id on the Hugging Face hub
  --model_path DIR   gets global_step0, latest, tokenizer/ and neox_config.yml
  --tp N             tensor ranks (1)
  --pp N             pipeline stages (0: one file per tensor rank){SHARED}"""


def main(argv: list[str]) -> int:
    """Convert and say so."""
    flags = parser(USAGE)
    flags.add_argument("--model", required=True)
    flags.add_argument("--model_path", type=Path, required=True)
    flags.add_argument("--tp", type=int, default=1)
    flags.add_argument("--pp", type=int, default=0)
    given = flags.parse_args(argv)
    from megatron.checkpoint.conversion.build import to_neox
    from megatron.checkpoint.conversion.flags import local_folder
    from megatron.checkpoint.conversion.model import ToNeoX

    request = ToNeoX(source=local_folder(given.model), out=given.model_path, tensor=given.tp, pipe=given.pp, **shared(given))
    print(to_neox(request))
    return 0


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT, ranks=False, keys=False))
