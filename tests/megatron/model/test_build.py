# SPDX-License-Identifier: Apache-2.0
"""Keys -> ModelSpec."""

from typing import Any

import pytest
import torch

from megatron.errors import ConfigError
from megatron.model.build import build_transformer
from megatron.model.build_spec import build_spec, mlp_convention_of, mlp_width
from megatron.model.recompute import Recompute
from megatron.model.slots import parameter_count
from megatron.model.spec import BackendName, NormKind, NormSpec, Positions, Residual, RopeScaling, RotarySpec
from megatron.neox_arguments import NeoXArgs
from support.tiny import tiny


def arguments(style: str = "neox", **overrides: Any) -> NeoXArgs:
    return NeoXArgs.from_dict(tiny(style, padded_vocab_size=512, **overrides))


def test_neox_style():
    spec = build_spec(arguments())
    block = spec.blocks[0]
    assert (spec.num_layers, spec.hidden_size, spec.vocab_size, spec.tied) == (2, 64, 512, False)
    assert block.residual is Residual.PARALLEL
    assert block.norm == NormSpec(kind=NormKind.LAYERNORM, size=64, eps=1e-5)
    assert block.attention.rotary == RotarySpec(dim=4)
    assert (block.mlp.width, block.mlp.activation) == (256, "gelu")
    assert spec.embedding.positions is Positions.NONE
    assert not block.attention.isolated


def test_llama_style():
    spec = build_spec(arguments("llama", sliding_window_pattern=[7, None], attention_backend="eager", attention_over_documents="isolated"))
    first, second = (block.attention for block in spec.blocks)
    assert (first.window, second.window) == (7, None)
    assert (first.num_kv_heads, first.bias, first.isolated, first.backend) == (2, False, True, BackendName.EAGER)
    assert spec.blocks[0].norm == NormSpec(kind=NormKind.RMSNORM, size=64, eps=1e-6, bias=False)


def test_gpt2_style():
    spec = build_spec(arguments("gpt2", bias_gelu_fusion=True, hidden_dropout=0.1))
    assert (spec.embedding.positions, spec.embedding.max_positions, spec.tied) == (Positions.LEARNED, 64, True)
    assert spec.blocks[1].mlp.activation == "gelu_tanh"
    assert spec.embedding.dropout == spec.blocks[0].hidden_dropout == 0.1


def test_further_choices():
    spec = build_spec(arguments(gpt_j_tied=True, apply_query_key_layer_scaling=True, precision="fp16", use_qk_layernorm=True))
    assert spec.blocks[0].residual is Residual.PARALLEL_TIED
    assert [block.attention.logit_divisor for block in spec.blocks] == [1.0, 2.0]
    assert spec.blocks[0].attention.qk_norm == NormSpec(kind=NormKind.LAYERNORM, size=16, eps=1e-5)
    scaling = build_spec(arguments(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}))
    assert scaling.blocks[0].attention.rotary == RotarySpec(
        dim=4, scaling=RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=16)
    )


def test_shapes_of_other_families():
    """Heads of their own size, biases on some projections, a norm of each head, scaled positions in some layers."""
    scaling = {"rope_type": "linear", "factor": 4.0}
    norms = {"use_qk_layernorm": True, "use_separate_qk_norms": True, "qk_norm_each_head": True}
    biases = {"use_bias_in_attn_linear": True, "use_bias_in_attn_output": False}
    layers = {"sliding_window_pattern": [7, None], "rope_scaling": scaling, "rope_scaling_layers": "full"}
    spec = build_spec(arguments("llama", num_attention_heads=6, head_dim=12, **norms, **biases, **layers))
    first, second = (block.attention for block in spec.blocks)
    assert (first.num_heads, first.head_dim, first.bias, first.output_bias, first.norm_each_head) == (6, 12, True, False, True)
    assert first.qk_norm is not None and first.qk_norm.size == 12
    assert first.rotary == RotarySpec(dim=12)
    assert second.rotary == RotarySpec(dim=12, scaling=RopeScaling(kind="linear", factor=4.0))
    everywhere = build_spec(arguments("llama", **{**layers, "rope_scaling_layers": "all"}))
    assert everywhere.blocks[0].attention.rotary == everywhere.blocks[1].attention.rotary


WIDTHS: list[tuple[dict[str, Any], int]] = [
    ({}, 256),
    ({"expansion_factor": 3}, 192),
    ({"intermediate_size": 100, "mlp_multiple_of": 64}, 128),
    ({"activation": "swiglu"}, 85),  # int(256 * 2 / 3) // 2
    ({"activation": "swiglu", "mlp_multiple_of": 64}, 128),
    ({"activation": "swiglu", "intermediate_size": 768}, 768),
    ({"activation": "swiglu", "intermediate_size": 768, "intermediate_size_convention": "two_thirds"}, 256),
    # LLaMA 7B's 11008 as upstream's configuration writes it
    ({"activation": "swiglu", "intermediate_size": 32768, "mlp_multiple_of": 256, "intermediate_size_convention": "two_thirds"}, 11008),
]


def test_width():
    for keys, width in WIDTHS:
        assert mlp_width(arguments(**keys)) == width, keys


def test_a_checkpoint_shows_the_convention():
    args = arguments(activation="swiglu", intermediate_size=768)
    assert mlp_convention_of(args, 768) == "literal"
    assert mlp_convention_of(args, 256) == "two_thirds"
    assert mlp_convention_of(args, 300) is None
    assert build_spec(args, mlp_convention="two_thirds").blocks[0].mlp.width == 256
    fixed = arguments(activation="swiglu", intermediate_size=768, intermediate_size_convention="literal")
    assert build_spec(fixed, mlp_convention="two_thirds").blocks[0].mlp.width == 768


REFUSED: list[dict[str, Any]] = [
    {"te_mha": True},
    {"use_mup": True},
    {"use_mup": True, "mup_base_hidden_size": 64, "init_method": "orthogonal"},
    {"use_mup": True, "mup_base_hidden_size": 64, "pos_emb": "rpe"},
    {"coord_check": True},
    {"norm": "te_rmsnorm"},
    {"attention_config": [[["mamba"], 2]]},
    {"attention_config": [[["bigbird"], 2]]},
    {"norm_placement": "post"},
    {"norm_placement": "olmo3"},
    {"use_separate_qk_norms": True},
    {"use_qk_layernorm": True, "qk_norm_each_head": True},
    {"head_dim": 3, "rotary_pct": 1.0},
    {"rotary_pct": 0.2},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "linear", "factr": 2.0}},
    {"moe_num_experts": 4},
    {"pos_emb": "learned", "max_position_embeddings": 32},
    {"num_kv_heads": 3},
]


def test_refusals_name_the_key():
    """By the configuration's own rules or, where those let it pass, by the model's."""
    for keys in REFUSED:
        with pytest.raises(ConfigError) as caught:
            build_spec(arguments(**keys))
        assert any(key in str(caught.value) for key in keys), keys


def test_the_padded_vocabulary_must_be_known():
    with pytest.raises(ConfigError, match="'padded_vocab_size' is not known"):
        build_spec(NeoXArgs.from_dict(tiny()))


def test_build_transformer():
    args = arguments(precision="bfloat16", checkpoint_activations=True, checkpoint_num_layers=2)
    model = build_transformer(args)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.recompute == Recompute(num_layers=2)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(model.spec)
