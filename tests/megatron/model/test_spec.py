# SPDX-License-Identifier: Apache-2.0
"""What muP changes in a model's description, and that it changes nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron.model.build_spec import build_spec
from megatron.model.spec import with_mup
from megatron.model.transformer import Transformer
from megatron.neox_arguments import NeoXArgs
from support.specs import HEADS, HIDDEN, model_spec
from support.tiny import tiny


def test_multipliers() -> None:
    made = with_mup(model_spec(), width_mult=4.0, init_scale=0.5, attn_temp=2.0, output_temp=5.0, embedding_mult=10.0)
    assert made.head.multiplier == 1 / 20 and made.embedding.multiplier == 10.0
    assert {block.attention.softmax_scale for block in made.blocks} == {1 / (HIDDEN // HEADS * 2.0)}
    assert (made.init.width_mult, made.init.scale) == (4.0, 0.5)


def test_at_the_base_width_only_the_scale_of_attention_differs() -> None:
    plain = model_spec()
    made = with_mup(plain, width_mult=1.0)
    blocks = tuple(replace(block, mixer=replace(block.attention, softmax_scale=None)) for block in made.blocks)
    assert replace(made, blocks=blocks) == plain


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_divided_by_the_width(tied: bool) -> None:
    """With the same weights, and attention scaled alike, logits are smaller by width_mult."""
    plain = model_spec(tied=tied, attention={"softmax_scale": 1 / (HIDDEN // HEADS)})
    model, wide = Transformer(plain, seed=3), Transformer(with_mup(plain, width_mult=4.0), seed=4)
    wide.load_state_dict(model.state_dict())
    tokens = torch.arange(12).reshape(2, 6)
    torch.testing.assert_close(wide(tokens).full() * 4.0, model(tokens).full())


def test_the_keys_reach_the_model() -> None:
    keys = {"mup_base_hidden_size": 16, "mup_init_scale": 3.0, "mup_output_temp": 2.0, "padded_vocab_size": 128}
    spec = build_spec(NeoXArgs.from_dict(tiny("llama", use_mup=True, **keys)))
    assert spec.head.multiplier == 1 / 8 and (spec.init.width_mult, spec.init.scale) == (4.0, 3.0)
    without = build_spec(NeoXArgs.from_dict(tiny("llama", mup_attn_temp=7.0, mup_embedding_mult=5.0, **keys)))
    assert without == build_spec(NeoXArgs.from_dict(tiny("llama", padded_vocab_size=128))), "without use_mup the keys did something"
