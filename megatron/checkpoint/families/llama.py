# SPDX-License-Identifier: Apache-2.0
"""LlamaForCausalLM: rows of names and rows of config fields, and the parts that its relatives share."""

from __future__ import annotations

from megatron.checkpoint.config_rows import Act, ConfigRow, Fixed, Heads, Length, Not, Pair, Rope, Theirs, Width
from megatron.checkpoint.families.common import COMMON, GATED_ACTIVATIONS, attention_bias, mlp_bias, untied
from megatron.checkpoint.mapping import Family, Row
from megatron.checkpoint.ops import Concat, FuseQKV, PadVocab

B = "{slot}."
L = "model.layers.{layer}."

EMBEDDING_ROWS = (Row("0.word_embeddings.weight", "model.embed_tokens.weight", PadVocab()),)

ATTENTION_ROWS = (
    Row(
        B + "attention.query_key_value.weight",
        (L + "self_attn.q_proj.weight", L + "self_attn.k_proj.weight", L + "self_attn.v_proj.weight"),
        FuseQKV(),
    ),
    Row(B + "attention.dense.weight", L + "self_attn.o_proj.weight"),
)

# linear1 is [value; gate], and theirs calls the value `up`.
MLP_ROWS = (
    Row(B + "mlp.linear1.weight", (L + "mlp.up_proj.weight", L + "mlp.gate_proj.weight"), Concat(0, 2)),
    Row(B + "mlp.linear2.weight", L + "mlp.down_proj.weight"),
)

PRE_NORM_ROWS = (
    Row(B + "input_layernorm.scale", L + "input_layernorm.weight"),
    Row(B + "post_attention_layernorm.scale", L + "post_attention_layernorm.weight"),
)

HEAD_ROWS = (
    Row("{norm}.norm.scale", "model.norm.weight"),
    Row("{head}.final_linear.weight", "lm_head.weight", PadVocab(), when=untied),
)

BIAS_ROWS = (
    Row(
        B + "attention.query_key_value.bias",
        (L + "self_attn.q_proj.bias", L + "self_attn.k_proj.bias", L + "self_attn.v_proj.bias"),
        FuseQKV(),
        when=attention_bias,
    ),
    Row(B + "attention.dense.bias", L + "self_attn.o_proj.bias", when=attention_bias),
    Row(B + "mlp.linear1.bias", (L + "mlp.up_proj.bias", L + "mlp.gate_proj.bias"), Concat(0, 2), when=mlp_bias),
    Row(B + "mlp.linear2.bias", L + "mlp.down_proj.bias", when=mlp_bias),
)

LLAMA_CONFIG: tuple[ConfigRow, ...] = (
    *COMMON,
    Pair("hidden_size", "hidden_size"),
    Pair("num_layers", "num_hidden_layers"),
    Pair("num_attention_heads", "num_attention_heads"),
    Pair("num_kv_heads", "num_key_value_heads"),
    Pair("padded_vocab_size", "vocab_size"),
    Length(),
    Heads(),
    Width(),
    Act(GATED_ACTIVATIONS),
    Rope(),
    Fixed("norm", "rmsnorm", "layernorm"),
    Pair("rms_norm_epsilon", "rms_norm_eps", 1e-6, 1e-8),
    Fixed("use_bias_in_norms", False, True),
    Fixed("gpt_j_residual", False, False),
    Not("no_weight_tying", "tie_word_embeddings", False, False),
    Fixed("hidden_dropout", 0.0, 0.0),
    Pair("attention_dropout", "attention_dropout", 0.0, 0.0),
)

LLAMA_IGNORED = (r"rotary_emb\.inv_freq$",)

LLAMA = Family(
    name="llama",
    hf="LlamaForCausalLM",
    model_type="llama",
    prefix="model.",
    ignored=LLAMA_IGNORED,
    tied_alias="lm_head.weight",
    rows=(*EMBEDDING_ROWS, *PRE_NORM_ROWS, *ATTENTION_ROWS, *MLP_ROWS, *BIAS_ROWS, *HEAD_ROWS),
    config=(
        *LLAMA_CONFIG,
        Pair("use_bias_in_attn_linear", "attention_bias", False, True),
        Pair("use_bias_in_mlp", "mlp_bias", False, True),
        Fixed("sliding_window_width", None, None),
        Fixed("sliding_window_pattern", None, None),
        Theirs("architectures", ["LlamaForCausalLM"], ["LlamaForCausalLM"], written=True),
    ),
)
