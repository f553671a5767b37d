# SPDX-License-Identifier: Apache-2.0
"""Configuration fields that a family cannot express are refused by name, in both directions."""

from typing import Any

import pytest

from megatron.checkpoint.convert import hf_config, neox_keys
from megatron.checkpoint.families.registry import family_named
from megatron.errors import ConfigError
from megatron.model.build import build_spec
from megatron.neox_arguments import NeoXArgs
from support.tiny import tiny

LLAMA = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 64,
    "intermediate_size": 88,
    "hidden_act": "silu",
}


def export(architecture: str, style: str, **overrides: Any) -> dict[str, Any]:
    args = NeoXArgs.from_dict(tiny(style, padded_vocab_size=512, **overrides))
    return hf_config(family_named(architecture), args.to_flat(), build_spec(args), vocab_size=500)


def test_what_the_other_side_cannot_express():
    table: list[tuple[str, str, dict[str, Any], str]] = [
        ("neox", "neox", {"gpt_j_tied": True}, "gpt_j_tied"),
        ("neox", "neox", {"pos_emb": "alibi"}, "pos_emb"),
        ("neox", "neox", {"norm": "rmsnorm"}, "norm"),
        ("neox", "neox", {"activation": "softsign"}, "activation"),
        ("neox", "neox", {"use_qk_layernorm": True}, "use_qk_layernorm"),
        ("neox", "neox", {"sliding_window_width": 8}, "sliding_window_width"),
        ("gpt2", "gpt2", {"pos_emb": "sinusoidal"}, "pos_emb"),
        ("llama", "llama", {"rotary_pct": 0.5}, "rotary_pct"),
        ("llama", "llama", {"hidden_dropout": 0.1}, "hidden_dropout"),
        ("llama", "neox", {}, "activation"),
        ("llama", "llama", {"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "rope_scaling"),
        ("mistral", "llama", {"sliding_window_pattern": [4, None]}, "sliding_window_pattern"),
    ]
    for architecture, style, overrides, key in table:
        with pytest.raises(ConfigError) as caught:
            export(architecture, style, **overrides)
        assert caught.value.where == key, overrides


def test_what_our_side_cannot_be():
    for change in (
        {"hidden_act": "tanh"},
        {"quantization_config": {"bits": 4}},
        {"partial_rotary_factor": 0.5},
    ):
        with pytest.raises(ConfigError) as caught:
            neox_keys(family_named("llama"), {**LLAMA, **change})
        assert next(iter(change)) in str(caught.value.where)
    with pytest.raises(ConfigError, match="stands for both"):
        neox_keys(family_named("gpt2"), {"resid_pdrop": 0.1, "embd_pdrop": 0.2, "n_positions": 8, "activation_function": "gelu"})


def test_rope_fields_of_both_generations():
    old = neox_keys(family_named("llama"), {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    new = neox_keys(family_named("llama"), {**LLAMA, "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}})
    assert old == new
    assert old["rotary_emb_base"] == 500000 and old["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert "rope_scaling" not in neox_keys(family_named("llama"), {**LLAMA, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}})


def test_exported_values():
    config = export("mistral", "llama", sliding_window_width=15, intermediate_size=768, intermediate_size_convention="two_thirds")
    # the window counts the token itself there; the width is the model's, not the key's
    assert (config["sliding_window"], config["intermediate_size"], config["vocab_size"]) == (16, 256, 500)
    assert config["architectures"] == ["MistralForCausalLM"]
    assert export("gpt2", "gpt2", bias_gelu_fusion=True)["activation_function"] == "gelu_new"
