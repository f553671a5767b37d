# SPDX-License-Identifier: Apache-2.0
"""Logits recorded from GPT-NeoX, at every eighth position of one row: our configuration, loader and model give the same."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron.checkpoint.build import spec_for
from megatron.checkpoint.formats.neox_files import read_weights
from megatron.model.build import build_transformer
from megatron.model.transformer import Transformer
from megatron.neox_arguments import NeoXArgs

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "train"
TOLERANCE = 1e-5
RUNS = (
    ("neox_pp0", "neox_pp1", "neox_seq_norpl_gelu", "neox_bias_gelu_fusion", "fork_neox_pp0", "fork_neox_pp1"),
    ("gpt2_pp0", "neox_rpe", "neox_scalenorm"),
    ("llama_pp0", "llama_pp1", "llama_i768_pp0"),  # the last one's width is two thirds of its intermediate_size
    ("fork_olmo3_mha_pp1", "fork_olmo3_gqa_flash_pp1"),
)


def build(run: str) -> tuple[Transformer, Path]:
    """The model of a run as its checkpoint shows it, and that checkpoint's folder."""
    overwrites = {"padded_vocab_size": 512, "attention_over_documents": "joined"}
    args = NeoXArgs.from_ymls([str(GOLDEN / run / "config.yml")], overwrites=overwrites)
    folder = GOLDEN / json.loads((GOLDEN / "index.json").read_text())[run]["initial_weights"]
    return build_transformer(args, spec_for(args, folder)).eval(), folder


def compare(model: Transformer, run: str, step: int) -> None:
    """Against the recording."""
    tokens = torch.from_numpy(np.load(GOLDEN / "fixed_tokens.npy").astype(np.int64))
    recorded = torch.from_numpy(np.load(GOLDEN / run / f"logits_every8th_step{step}.npy"))
    with torch.no_grad():
        ours = model(tokens).full()[0, ::8]
    assert (ours - recorded).abs().max() < TOLERANCE, run


@pytest.mark.parametrize("runs", RUNS, ids=lambda runs: runs[0])
def test_initial_weights(runs: tuple[str, ...]) -> None:
    """Both forms of checkpoint, every residual form, both fused layouts, both meanings of a gated intermediate_size."""
    for run in runs:
        model, folder = build(run)
        model.load_state_dict({f"sequential.{name}": tensor for name, tensor in read_weights(folder).items()})
        compare(model, run, step=0)


def test_trained_weights() -> None:
    """After eight steps the biases are no longer zero."""
    model, _ = build("neox_pp0")
    weights = load_file(GOLDEN / "weights" / "neox_pp0_step8.safetensors")
    model.load_state_dict({f"sequential.{name}": tensor for name, tensor in weights.items()})
    compare(model, "neox_pp0", step=8)
