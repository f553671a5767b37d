# SPDX-License-Identifier: Apache-2.0
"""MistralForCausalLM: LLaMA's tensors without biases, and a sliding window."""

from __future__ import annotations

from megatron.checkpoint.mapping.config_rows import Fixed
from megatron.checkpoint.mapping.families.common import ONE_ATTENTION_BIAS, PLAIN_NORMS
from megatron.checkpoint.mapping.families.llama import (
    ATTENTION_ROWS,
    EMBEDDING_ROWS,
    HEAD_ROWS,
    IGNORED,
    MLP_ROWS,
    NO_MLP_BIAS,
    PRE_NORM_ROWS,
    decoder_config,
)
from megatron.checkpoint.mapping.position_rows import Rope, Window
from megatron.checkpoint.mapping.rows import Family

MISTRAL = Family(
    name="mistral",
    hf="MistralForCausalLM",
    model_type="mistral",
    prefix="model.",
    ignored=IGNORED,
    tied_alias="lm_head.weight",
    rows=(*EMBEDDING_ROWS, *PRE_NORM_ROWS, *ATTENTION_ROWS, *MLP_ROWS, *HEAD_ROWS),
    config=(
        *decoder_config("MistralForCausalLM", kv_heads=8),
        *PLAIN_NORMS,
        Rope(),
        Window(default=4096),
        Fixed("use_bias_in_attn_linear", False, True),
        ONE_ATTENTION_BIAS,
        NO_MLP_BIAS,
    ),
)
