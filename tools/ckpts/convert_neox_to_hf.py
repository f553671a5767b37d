#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: a NeoX checkpoint, of any number of tensor ranks and stages, as a Hugging Face directory."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.checkpoint.conversion.flags import SHARED, parser, shared  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402

ABOUT = "Writes a checkpoint as a Hugging Face directory, a tensor at a time, and proves it by its logits."
USAGE = f"""python tools/ckpts/convert_neox_to_hf.py --input_dir DIR --output_dir DIR [--config_file FILE ...] [flags]

  --input_dir DIR          a global_step<N> folder, or what a run saved to (then the step that latest names)
  --output_dir DIR         the Hugging Face directory
  --config_file FILE ...   the run's configuration; without it, the one kept in the step's folder
  --precision P            auto (as in the checkpoint), fp16, bf16 or fp32
  --architecture A         neox, gpt2, llama, mistral, ...; without it, what the configuration and the tensors say
  --no_save_tokenizer      write no tokenizer
  --vocab-is-hf-tokenizer  vocab_file lies in a Hugging Face tokenizer's folder, to be copied whole
  --vocab-size N           rows kept of the vocabulary; without it, those of the model it was made of, else all
  --pad-token-id N         pad_token_id in config.json; a reward model needs it
  --max-shard-size BYTES   of each safetensors file (5000000000){SHARED}"""


def main(argv: list[str]) -> int:
    """Convert and say so."""
    flags = parser(USAGE)
    flags.add_argument("--input_dir", type=Path, required=True)
    flags.add_argument("--output_dir", type=Path, required=True)
    flags.add_argument("--config_file", type=Path, nargs="+", default=[])
    flags.add_argument("--precision", choices=("auto", "fp16", "bf16", "fp32"), default="auto")
    flags.add_argument("--architecture")
    flags.add_argument("--no_save_tokenizer", action="store_true")
    flags.add_argument("--vocab-is-hf-tokenizer", action="store_true")
    flags.add_argument("--vocab-size", type=int)
    flags.add_argument("--pad-token-id", type=int, default=-1)
    flags.add_argument("--max-shard-size", type=int, default=5 * 10**9)
    given = flags.parse_args(argv)
    from megatron.checkpoint.conversion.build import to_hf
    from megatron.checkpoint.conversion.model import Precision, ToHF

    request = ToHF(
        source=given.input_dir,
        out=given.output_dir,
        configs=given.config_file,
        architecture=given.architecture,
        precision=Precision(given.precision),
        vocab_size=given.vocab_size,
        tokenizer=not given.no_save_tokenizer,
        pad_token_id=None if given.pad_token_id < 0 else given.pad_token_id,
        shard_bytes=given.max_shard_size,
        **shared(given),
    )
    print(to_hf(request))
    return 0


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT, ranks=False, keys=False))
