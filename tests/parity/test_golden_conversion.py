# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of GPT-NeoX, of every form of file, converted: transformers gives the logits that GPT-NeoX gave."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.checkpoint.conversion.build import describe_step, to_hf
from megatron.checkpoint.conversion.logit_compare import difference, fixed_tokens, hf_logits, neox_logits, sampled_logits, verify
from megatron.checkpoint.conversion.model import ToHF
from megatron.checkpoint.conversion.weights import Whole
from megatron.errors import CheckpointError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "train"
TOLERANCE = 1e-5
# Two tensor ranks, one file and a file per layer, both residuals, both meanings of a gated intermediate_size.
RUNS = ("neox_tp2", "neox_pp1", "gpt2_pp0", "llama_pp1", "llama_i768_pp0", "fork_olmo3_mha_pp1")
OTHERS = ("neox_pp0", "neox_seq_norpl_gelu", "neox_bias_gelu_fusion", "fork_neox_pp0", "fork_neox_pp1", "llama_pp0", "neox_pp2")
REFUSED = {"neox_rpe": "pos_emb", "neox_scalenorm": "norm"}


def convert(run: str, out: Path) -> Path:
    """Returns the checkpoint's folder."""
    step = GOLDEN / json.loads((GOLDEN / "index.json").read_text())[run]["initial_weights"]
    to_hf(ToHF(source=step, out=out, configs=[GOLDEN / run / "config.yml"], verify=False))
    return step


def check(run: str, tmp_path: Path) -> None:
    step = convert(run, tmp_path / run)
    tokens = torch.from_numpy(np.load(GOLDEN / "fixed_tokens.npy").astype(np.int64))
    theirs = hf_logits(tmp_path / run, tokens)
    recording = GOLDEN / run / "logits_every8th_step0.npy"
    if recording.is_file():
        assert np.abs(theirs[0, ::8].numpy() - np.load(recording)).max() < TOLERANCE, run
    _, model = describe_step(step, [GOLDEN / run / "config.yml"])
    assert (neox_logits(Whole(step, model), model, tokens) - theirs).abs().max() < TOLERANCE, run


@pytest.mark.timeout(120)
def test_recorded_logits(tmp_path: Path) -> None:
    for run in RUNS:
        check(run, tmp_path)
    # of a few layers alone
    step = GOLDEN / "neox_tp2" / "ckpt" / "global_step0"
    _, model = describe_step(step, [GOLDEN / "neox_tp2" / "config.yml"])
    tokens = fixed_tokens(512, 64)
    second, theirs = sampled_logits(Whole(step, model), tmp_path / "neox_tp2", model, tokens, [1])
    assert (second - theirs).abs().max() < TOLERANCE
    first, theirs = sampled_logits(Whole(step, model), tmp_path / "neox_tp2", model, tokens, [0])
    assert (first - theirs).abs().max() < TOLERANCE and (first - second).abs().max() > 0.1
    # and what is another model is seen
    step = GOLDEN / "llama_pp0" / "ckpt" / "global_step0"
    _, model = describe_step(step, [GOLDEN / "llama_pp0" / "config.yml"])
    with pytest.raises(CheckpointError, match="not the same model"):
        verify(step, tmp_path / "llama_pp1", model, None, asked=True)


@pytest.mark.full
@pytest.mark.timeout(120)
def test_other_recorded_logits(tmp_path: Path) -> None:
    for run in OTHERS:
        check(run, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("run", REFUSED)
def test_what_transformers_has_no_model_for(run: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=REFUSED[run]):
        convert(run, tmp_path / run)
    assert not list(tmp_path.iterdir())


def test_bounds() -> None:
    """Equal weights may differ by the arithmetic alone, shares of a third by a rounding; a NaN is never the same."""
    ours = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert difference(ours, ours + 5e-6).good and not difference(ours, ours + 1e-3).good
    assert difference(ours, ours + 1e-3, torch.bfloat16).good and not difference(ours, ours + 1, torch.bfloat16).good
    assert not difference(ours, ours * float("nan"), torch.bfloat16).good
    assert difference(ours, ours[..., :7]).greatest == 0
    assert fixed_tokens(100, 8).shape == (2, 8) and torch.equal(fixed_tokens(100, 99), fixed_tokens(100, 99))
