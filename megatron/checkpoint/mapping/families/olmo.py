# SPDX-License-Identifier: Apache-2.0
"""Olmo2ForCausalLM and Olmo3ForCausalLM: LLaMA's tensors, norms after the sublayers and of all queries, all keys."""

from __future__ import annotations

from megatron.checkpoint.mapping.config_rows import Config, ConfigRow, Fixed
from megatron.checkpoint.mapping.families.llama import (
    ATTENTION_BIAS_CONFIG,
    ATTENTION_BIAS_ROWS,
    ATTENTION_ROWS,
    EMBEDDING_ROWS,
    HEAD_ROWS,
    IGNORED,
    MLP_ROWS,
    NO_MLP_BIAS,
    B,
    L,
    decoder_config,
)
from megatron.checkpoint.mapping.position_rows import FULL, SLIDING, LayerWindows, Rope
from megatron.checkpoint.mapping.rows import NO_WINDOWS, Family, Row

ROWS = (
    *EMBEDDING_ROWS,
    Row(B + "post_attention_layernorm.scale", L + "post_attention_layernorm.weight"),
    Row(B + "post_feedforward_layernorm.scale", L + "post_feedforward_layernorm.weight"),
    Row(B + "attention.q_norm.scale", L + "self_attn.q_norm.weight"),
    Row(B + "attention.k_norm.scale", L + "self_attn.k_norm.weight"),
    *ATTENTION_ROWS,
    *ATTENTION_BIAS_ROWS,
    *MLP_ROWS,
    *HEAD_ROWS,
)

NORMS: tuple[ConfigRow, ...] = (
    Fixed("norm_placement", "olmo3", "pre"),
    Fixed("use_qk_layernorm", True, False),
    Fixed("use_separate_qk_norms", True, False),
    Fixed("qk_norm_each_head", False, False),
    *ATTENTION_BIAS_CONFIG,
    NO_MLP_BIAS,
)


def three_of_four(config: Config) -> list[str]:
    """Types of layers that a config means which does not list them: every fourth sees everything."""
    return [SLIDING if (index + 1) % 4 else FULL for index in range(config["num_hidden_layers"])]


OLMO2 = Family(
    name="olmo2",
    hf="Olmo2ForCausalLM",
    model_type="olmo2",
    prefix="model.",
    ignored=IGNORED,
    tied_alias="lm_head.weight",
    rows=ROWS,
    config=(
        *decoder_config("Olmo2ForCausalLM", epsilon=1e-5),
        *NORMS,
        *NO_WINDOWS,
        Rope(kinds=("linear",), kind_field="type"),  # transformers 4 accepts no other name there
    ),
)

OLMO3 = Family(
    name="olmo3",
    hf="Olmo3ForCausalLM",
    model_type="olmo3",
    prefix="model.",
    ignored=IGNORED,
    tied_alias="lm_head.weight",
    rows=ROWS,
    config=(*decoder_config("Olmo3ForCausalLM", epsilon=1e-5), *NORMS, LayerWindows(three_of_four), Rope(layers="full")),
)
