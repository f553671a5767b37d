# SPDX-License-Identifier: Apache-2.0
"""Configuration fields that a family cannot express are refused by name, in both directions."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.checkpoint.mapping.families import family_named, hf_config, neox_keys
from megatron.checkpoint.mapping.position_rows import LayerWindows
from megatron.errors import ConfigError
from megatron.model.build_spec import build_spec
from megatron.model.slots import parameter_count
from megatron.neox_arguments import NeoXArgs
from support.families import STYLES, family_spec
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

HALF = {"sliding_window_pattern": [4, None]}
QWEN2 = STYLES["qwen2"][1]
OLMO = STYLES["olmo3"][1]


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
        ("neox", "neox", {"head_dim": 8}, "head_dim"),
        ("gpt2", "gpt2", {"head_dim": 8}, "head_dim"),
        ("gpt2", "gpt2", {"use_bias_in_attn_output": False}, "use_bias_in_attn_output"),
        ("llama", "llama", {"use_bias_in_attn_output": True}, "use_bias_in_attn_output"),
        ("qwen2", "llama", {}, "use_bias_in_attn_linear"),
        ("qwen2", "llama", {"use_bias_in_attn_linear": True}, "use_bias_in_attn_output"),
        ("qwen2", "llama", {**QWEN2, "sliding_window_pattern": [4, 5]}, "sliding_window_pattern"),
        ("qwen3", "llama", {"use_qk_layernorm": True, "use_separate_qk_norms": True}, "qk_norm_each_head"),
        ("olmo2", "llama", {}, "norm_placement"),
        ("olmo2", "llama", {**OLMO, "sliding_window_width": 4}, "sliding_window_width"),
        ("olmo2", "llama", {**OLMO, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling"),
        ("olmo3", "llama", {**OLMO, "use_bias_in_mlp": True}, "use_bias_in_mlp"),
        ("olmo3", "llama", {**OLMO, **HALF, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling_layers"),
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
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
    ):
        with pytest.raises(ConfigError) as caught:
            neox_keys(family_named("llama"), {**LLAMA, **change})
        assert next(iter(change)) in str(caught.value.where)
    with pytest.raises(ConfigError, match="head_dim 32 is not"):
        neox_keys(family_named("neox"), {**LLAMA, "hidden_act": "gelu", "head_dim": 32})
    for change in ({"layer_types": ["chunked_attention"] * 2}, {"layer_types": ["sliding_attention"] * 2}):
        with pytest.raises(ConfigError) as caught:
            neox_keys(family_named("qwen2"), {**LLAMA, **change})
        assert caught.value.where == "config.json: layer_types"
    with pytest.raises(ConfigError, match="stands for both"):
        neox_keys(family_named("gpt2"), {"resid_pdrop": 0.1, "embd_pdrop": 0.2, "n_positions": 8, "activation_function": "gelu"})


def test_rope_fields_of_both_generations():
    old = neox_keys(family_named("llama"), {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    new = neox_keys(family_named("llama"), {**LLAMA, "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}})
    assert old == new
    assert old["rotary_emb_base"] == 500000 and old["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert "rope_scaling" not in neox_keys(family_named("llama"), {**LLAMA, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}})


def test_rope_fields_of_each_type_of_layer():
    """OLMo-3's sliding layers are plain; elsewhere the types may not differ."""
    yarn = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 8}
    plain = {"rope_type": "default", "rope_theta": 5e5}
    typed = {**LLAMA, "rope_parameters": {"full_attention": yarn, "sliding_attention": plain}}
    keys = neox_keys(family_named("olmo3"), typed)
    assert (keys["rope_scaling"]["rope_type"], keys["rope_scaling_layers"], keys["rotary_emb_base"]) == ("yarn", "full", 500000)
    assert keys == neox_keys(family_named("olmo3"), {**LLAMA, "rope_parameters": yarn})
    for family, sliding in (("qwen2", plain), ("olmo3", {**plain, "rope_theta": 1e4}), ("olmo3", yarn)):
        with pytest.raises(ConfigError, match="differ so by type of layer"):
            neox_keys(family_named(family), {**LLAMA, "rope_parameters": {"full_attention": yarn, "sliding_attention": sliding}})


def test_exported_values():
    config = export("mistral", "llama", sliding_window_width=15, intermediate_size=768, intermediate_size_convention="two_thirds")
    # the window counts the token itself there; the width is the model's, not the key's
    assert (config["sliding_window"], config["intermediate_size"], config["vocab_size"]) == (16, 256, 500)
    assert config["architectures"] == ["MistralForCausalLM"]
    assert export("gpt2", "gpt2", bias_gelu_fusion=True)["activation_function"] == "gelu_new"


def test_layers_that_are_not_listed():
    """What a short config.json means to transformers: windows in Qwen's last layers, in three of OLMo-3's four."""
    qwen = neox_keys(
        family_named("qwen2"), {**LLAMA, "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}
    )
    assert qwen["sliding_window_pattern"] == [None, None, None, 8]
    assert "sliding_window_width" not in neox_keys(family_named("qwen2"), {**LLAMA, "sliding_window": 9})
    yarn = {"rope_type": "yarn", "factor": 2.0}
    olmo = neox_keys(family_named("olmo3"), {**LLAMA, "num_hidden_layers": 8, "rope_scaling": yarn})
    assert olmo["sliding_window_pattern"] == [4095, 4095, 4095, None]
    assert (olmo["rope_scaling_layers"], olmo["rope_scaling"]["original_max_position_embeddings"]) == ("full", 64)
    assert neox_keys(family_named("mistral"), LLAMA)["sliding_window_width"] == 4095
    assert neox_keys(family_named("qwen3"), LLAMA)["head_dim"] == 128


def test_yarn_with_two_scales():
    """Their ratio is the factor on queries and keys."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    found = neox_keys(family_named("llama"), {**LLAMA, "rope_scaling": yarn})["rope_scaling"]
    assert found["attention_factor"] == pytest.approx((0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1))
    assert "mscale" not in found


@settings(deadline=None, max_examples=20)
@given(types=st.lists(st.booleans(), min_size=1, max_size=9), width=st.integers(2, 9), family=st.sampled_from(["qwen2", "olmo3"]))
def test_types_of_layers_there_and_back(types: list[bool], width: int, family: str):
    named = ["sliding_attention" if slides else "full_attention" for slides in types]
    given_fields = {"layer_types": named, "sliding_window": width, "use_sliding_window": True, "num_hidden_layers": len(types)}
    (row,) = (row for row in family_named(family).config if isinstance(row, LayerWindows))
    keys = row.to_neox(given_fields)
    pattern = keys.get("sliding_window_pattern") or [keys.get("sliding_window_width")]
    spec = family_spec(family)
    windows = [pattern[index % len(pattern)] for index in range(len(types))]
    block = spec.blocks[0]
    blocks = tuple(replace(block, mixer=replace(block.attention, window=window)) for window in windows)
    fields = row.to_hf(keys, replace(spec, blocks=blocks))
    assert fields["layer_types"] == named and (fields["sliding_window"] == width or not any(types))


PUBLISHED: list[tuple[str, int, dict[str, Any]]] = [
    (
        "GPTNeoXForCausalLM",
        162_322_944,  # Pythia 160M
        {
            "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 50304,
            "hidden_act": "gelu", "rotary_pct": 0.25, "max_position_embeddings": 2048, "use_parallel_residual": True,
        },
    ),
    (
        "GPT2LMHeadModel",
        124_439_808,
        {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257, "activation_function": "gelu_new"},
    ),
    (
        "LlamaForCausalLM",
        1_235_814_400,  # Llama 3.2 1B
        {
            "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
            "intermediate_size": 8192, "vocab_size": 128256, "hidden_act": "silu", "max_position_embeddings": 131072,
            "tie_word_embeddings": True, "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
    ),
    (
        "MistralForCausalLM",
        12_247_782_400,  # Mistral Nemo, whose heads are not hidden_size / heads
        {
            "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "intermediate_size": 14336, "vocab_size": 131072, "hidden_act": "silu", "max_position_embeddings": 1024000,
            "sliding_window": None, "rope_theta": 1000000.0, "rms_norm_eps": 1e-05,
        },
    ),
    (
        "Qwen2ForCausalLM",
        494_032_768,  # Qwen2.5 0.5B
        {
            "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864,
            "vocab_size": 151936, "hidden_act": "silu", "max_position_embeddings": 32768, "tie_word_embeddings": True,
            "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 24, "rope_theta": 1000000.0,
        },
    ),
    (
        "Qwen3ForCausalLM",
        8_190_735_360,  # Qwen3 8B
        {
            "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "intermediate_size": 12288, "vocab_size": 151936, "hidden_act": "silu", "max_position_embeddings": 40960,
            "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 36,
            "rope_theta": 1000000, "rope_scaling": None, "attention_bias": False,
        },
    ),
    (
        "Olmo2ForCausalLM",
        7_298_617_344,  # OLMo-2 7B
        {
            "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
            "intermediate_size": 11008, "vocab_size": 100352, "hidden_act": "silu", "max_position_embeddings": 4096,
            "rope_theta": 500000, "rms_norm_eps": 1e-06, "attention_bias": False,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "count", "config"), PUBLISHED, ids=lambda value: value if isinstance(value, str) else "")
def test_published_models(architecture: str, count: int, config: dict[str, Any]):
    """Their configurations describe models of their size."""
    run = {"train_micro_batch_size_per_gpu": 1, "train_iters": 1, "global_num_gpus": 1}
    args = NeoXArgs.from_dict({**run, **neox_keys(family_named(architecture), config)})
    assert parameter_count(build_spec(args)) == count
