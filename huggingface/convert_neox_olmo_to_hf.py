#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: a NeoX checkpoint of an OLMo model as a Hugging Face directory, described by the model it came from."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

from megatron.checkpoint.conversion.flags import SHARED, parser, shared  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402

ABOUT = "Writes the newest step of an OLMo run as a Hugging Face directory, whatever its layout, and proves it by its logits."
USAGE = f"""python huggingface/convert_neox_olmo_to_hf.py --checkpoint-dir DIR --hf-model MODEL --output-dir DIR [flags]

  --checkpoint-dir DIR   what a run saved to; the step is the one that latest names
  --hf-model MODEL       folder or hub id of the model it came from: its config and its tokenizer are taken
  --revision R           of the hub's model
  --output-dir DIR       the Hugging Face directory
  --precision P          bf16 (the default), fp16, fp32 or auto
  --push-to-hub ID       then upload it there{SHARED}"""


def main(argv: list[str]) -> int:
    """Convert and say so."""
    flags = parser(USAGE)
    flags.add_argument("--checkpoint-dir", type=Path, required=True)
    flags.add_argument("--hf-model", required=True)
    flags.add_argument("--revision")
    flags.add_argument("--output-dir", type=Path, required=True)
    flags.add_argument("--precision", choices=("auto", "fp16", "bf16", "fp32"), default="bf16")
    flags.add_argument("--push-to-hub")
    given = flags.parse_args(argv)
    from megatron.checkpoint.conversion.build import to_hf
    from megatron.checkpoint.conversion.flags import local_folder
    from megatron.checkpoint.conversion.model import Precision, ToHF
    from megatron.hub.client import upload_folder

    reference = local_folder(given.hf_model, given.revision, weights=False)
    request = ToHF(
        source=given.checkpoint_dir, out=given.output_dir, reference=reference, precision=Precision(given.precision), **shared(given)
    )
    print(to_hf(request))
    if given.push_to_hub:
        print(f"uploaded to {upload_folder(given.output_dir, given.push_to_hub)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT, ranks=False, keys=False))
