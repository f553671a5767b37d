# SPDX-License-Identifier: Apache-2.0
"""MistralForCausalLM: LLaMA's tensors without biases, and a sliding window."""

from __future__ import annotations

from megatron.checkpoint.config_rows import Fixed, Theirs, Window
from megatron.checkpoint.families.llama import (
    ATTENTION_ROWS,
    EMBEDDING_ROWS,
    HEAD_ROWS,
    LLAMA_CONFIG,
    LLAMA_IGNORED,
    MLP_ROWS,
    PRE_NORM_ROWS,
)
from megatron.checkpoint.mapping import Family

MISTRAL = Family(
    name="mistral",
    hf="MistralForCausalLM",
    model_type="mistral",
    prefix="model.",
    ignored=LLAMA_IGNORED,
    tied_alias="lm_head.weight",
    rows=(*EMBEDDING_ROWS, *PRE_NORM_ROWS, *ATTENTION_ROWS, *MLP_ROWS, *HEAD_ROWS),
    config=(
        *LLAMA_CONFIG,
        Window(),
        Fixed("use_bias_in_attn_linear", False, True),
        Fixed("use_bias_in_mlp", False, True),
        Theirs("architectures", ["MistralForCausalLM"], ["MistralForCausalLM"], written=True),
    ),
)
