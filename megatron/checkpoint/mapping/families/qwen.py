# SPDX-License-Identifier: Apache-2.0
"""Qwen2ForCausalLM and Qwen3ForCausalLM: LLaMA's tensors with biases on q, k and v alone, or with a norm of each head's q and k."""

from __future__ import annotations

from megatron.checkpoint.mapping.config_rows import Config, Fixed
from megatron.checkpoint.mapping.families.common import PLAIN_NORMS
from megatron.checkpoint.mapping.families.llama import (
    ATTENTION_BIAS_CONFIG,
    ATTENTION_BIAS_ROWS,
    ATTENTION_ROWS,
    EMBEDDING_ROWS,
    HEAD_ROWS,
    IGNORED,
    MLP_ROWS,
    NO_MLP_BIAS,
    PRE_NORM_ROWS,
    QKV_BIAS_ROWS,
    B,
    L,
    decoder_config,
)
from megatron.checkpoint.mapping.position_rows import FULL, SLIDING, LayerWindows, Rope
from megatron.checkpoint.mapping.rows import Family, Row

COMMON_ROWS = (*EMBEDDING_ROWS, *PRE_NORM_ROWS, *ATTENTION_ROWS, *MLP_ROWS, *HEAD_ROWS)


def usual_types(config: Config) -> list[str]:
    """Types of layers that a config means which does not list them: the last ones slide, if any."""
    first = config.get("max_window_layers", 28) if config.get("use_sliding_window", False) else config["num_hidden_layers"]
    return [SLIDING if index >= first else FULL for index in range(config["num_hidden_layers"])]


WINDOWS = LayerWindows(usual_types, switch="use_sliding_window")

QWEN2 = Family(
    name="qwen2",
    hf="Qwen2ForCausalLM",
    model_type="qwen2",
    prefix="model.",
    ignored=IGNORED,
    tied_alias="lm_head.weight",
    rows=(*COMMON_ROWS, *QKV_BIAS_ROWS),
    config=(
        *decoder_config("Qwen2ForCausalLM", kv_heads=32),
        *PLAIN_NORMS,
        Rope(),
        WINDOWS,
        Fixed("use_bias_in_attn_linear", True, True),
        Fixed("use_bias_in_attn_output", False, None),
        NO_MLP_BIAS,
    ),
)

QWEN3 = Family(
    name="qwen3",
    hf="Qwen3ForCausalLM",
    model_type="qwen3",
    prefix="model.",
    ignored=IGNORED,
    tied_alias="lm_head.weight",
    rows=(
        *COMMON_ROWS,
        *ATTENTION_BIAS_ROWS,
        Row(B + "attention.q_norm.scale", L + "self_attn.q_norm.weight"),
        Row(B + "attention.k_norm.scale", L + "self_attn.k_norm.weight"),
    ),
    config=(
        *decoder_config("Qwen3ForCausalLM", kv_heads=32, head_dim=128),
        Fixed("norm_placement", "pre", "pre"),
        Fixed("use_qk_layernorm", True, False),
        Fixed("use_separate_qk_norms", True, False),
        Fixed("qk_norm_each_head", True, False),
        Rope(),
        WINDOWS,
        *ATTENTION_BIAS_CONFIG,
        NO_MLP_BIAS,
    ),
)
