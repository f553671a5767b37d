#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: the tensor ranks of a checkpoint (of GPT-NeoX-20B or any other) merged into one."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.checkpoint.conversion.flags import SHARED, parser, shared  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402

# Of the published checkpoint, which has no copy of it in its steps (Black et al., arXiv 2204.06745, table 1).
NEOX_20B = {
    "num_layers": 44,
    "hidden_size": 6144,
    "num_attention_heads": 64,
    "seq_length": 2048,
    "max_position_embeddings": 2048,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "no_weight_tying": True,
    "gpt_j_residual": True,
    "bias_gelu_fusion": True,
    "tokenizer_type": "HFTokenizer",
    "train_iters": 150000,
}

ABOUT = "Merges the tensor ranks of a checkpoint into one, whatever names it has and however many layers."
USAGE = f"""python tools/ckpts/merge20b.py --input_dir DIR --output_dir DIR [flags]

  --input_dir DIR          a global_step<N> folder, or one with latest
  --output_dir DIR         gets global_step<N>, latest and neox_config.yml
  --config_file FILE ...   the configuration, where the checkpoint holds no copy; without any, that of GPT-NeoX-20B
  --num_output_shards N    tensor ranks of the result (1){SHARED}"""


def main(argv: list[str]) -> int:
    """Convert and say so."""
    flags = parser(USAGE)
    flags.add_argument("--input_dir", type=Path, required=True)
    flags.add_argument("--output_dir", type=Path, required=True)
    flags.add_argument("--config_file", type=Path, nargs="+", default=[])
    flags.add_argument("--num_output_shards", type=int, default=1)
    given = flags.parse_args(argv)
    from megatron.checkpoint.conversion.build import rewrite, step_folder
    from megatron.checkpoint.conversion.model import Rewrite

    step = step_folder(given.input_dir)
    request = Rewrite(
        source=step,
        out=given.output_dir,
        configs=given.config_file,
        keys=NEOX_20B,
        tensor=given.num_output_shards,
        pipe=1 if any(step.glob("layer_*")) else 0,
        **shared(given),
    )
    print(rewrite(request))
    return 0


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT, ranks=False, keys=False))
