#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: one step of an OLMo run as a Hugging Face directory, described by a reference model."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

from megatron.checkpoint.conversion.flags import SHARED, parser, shared  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402

ABOUT = "Writes a step of an OLMo run as a Hugging Face directory, whatever its layout, and proves it by its logits."
USAGE = f"""python huggingface/convert_neox_to_hf_olmo.py --neox-checkpoint DIR --output-dir DIR [flags]

  --neox-checkpoint DIR     a global_step<N> folder
  --reference-model MODEL   folder or hub id whose config and tokenizer are taken (allenai/OLMo-3-1025-7B)
  --revision R              of the hub's model
  --output-dir DIR          the Hugging Face directory
  --dtype D                 bfloat16 (the default), float16 or float32{SHARED}"""


def main(argv: list[str]) -> int:
    """Convert and say so."""
    flags = parser(USAGE)
    flags.add_argument("--neox-checkpoint", type=Path, required=True)
    flags.add_argument("--reference-model", default="allenai/OLMo-3-1025-7B")
    flags.add_argument("--revision")
    flags.add_argument("--output-dir", type=Path, required=True)
    flags.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    given = flags.parse_args(argv)
    from megatron.checkpoint.conversion.build import to_hf
    from megatron.checkpoint.conversion.flags import local_folder
    from megatron.checkpoint.conversion.model import Precision, ToHF

    reference = local_folder(given.reference_model, given.revision, weights=False)
    request = ToHF(
        source=given.neox_checkpoint, out=given.output_dir, reference=reference, precision=Precision.of(given.dtype), **shared(given)
    )
    print(to_hf(request))
    return 0


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT, ranks=False, keys=False))
