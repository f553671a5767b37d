# SPDX-License-Identifier: Apache-2.0
"""GPT2LMHeadModel: rows of names and rows of config fields."""

from __future__ import annotations

from megatron.checkpoint.mapping.config_rows import Act, FieldPair, Fixed, Heads, Length, Not, Theirs, Width
from megatron.checkpoint.mapping.families.common import ACTIVATIONS, COMMON, NO_WINDOWS, ONE_ATTENTION_BIAS, PLAIN_NORMS, untied
from megatron.checkpoint.mapping.ops import Chain, Chunk, FuseQKV, PadVocab, Transpose
from megatron.checkpoint.mapping.rows import Family, Row

B = "{slot}."
L = "transformer.h.{layer}."

# One matrix [h, q | k | v] on their side, one per-head interleave on ours.
QKV = Chain((Transpose(), Chunk(0, 3), FuseQKV()))

GPT2 = Family(
    name="gpt2",
    hf="GPT2LMHeadModel",
    model_type="gpt2",
    prefix="transformer.",
    ignored=(r"\.attn\.(bias|masked_bias)$",),
    tied_alias="lm_head.weight",
    rows=(
        Row("0.word_embeddings.weight", "transformer.wte.weight", PadVocab()),
        Row("0.position_embeddings.weight", "transformer.wpe.weight"),
        Row(B + "input_layernorm.weight", L + "ln_1.weight"),
        Row(B + "input_layernorm.bias", L + "ln_1.bias"),
        Row(B + "post_attention_layernorm.weight", L + "ln_2.weight"),
        Row(B + "post_attention_layernorm.bias", L + "ln_2.bias"),
        Row(B + "attention.query_key_value.weight", L + "attn.c_attn.weight", QKV),
        Row(B + "attention.query_key_value.bias", L + "attn.c_attn.bias", QKV),
        Row(B + "attention.dense.weight", L + "attn.c_proj.weight", Transpose()),
        Row(B + "attention.dense.bias", L + "attn.c_proj.bias"),
        Row(B + "mlp.linear1.weight", L + "mlp.c_fc.weight", Transpose()),
        Row(B + "mlp.linear1.bias", L + "mlp.c_fc.bias"),
        Row(B + "mlp.linear2.weight", L + "mlp.c_proj.weight", Transpose()),
        Row(B + "mlp.linear2.bias", L + "mlp.c_proj.bias"),
        Row("{norm}.norm.weight", "transformer.ln_f.weight"),
        Row("{norm}.norm.bias", "transformer.ln_f.bias"),
        Row("{head}.final_linear.weight", "lm_head.weight", PadVocab(), when=untied),
    ),
    config=(
        *COMMON,
        *PLAIN_NORMS,
        ONE_ATTENTION_BIAS,
        FieldPair("hidden_size", "n_embd"),
        FieldPair("num_layers", "n_layer"),
        FieldPair("num_attention_heads", "n_head"),
        FieldPair("padded_vocab_size", "vocab_size"),
        Length("n_positions"),
        Heads("n_embd", "n_head", free=False),
        Width("n_inner"),
        Act(ACTIVATIONS, "activation_function"),
        Fixed("pos_emb", "learned", "learned"),
        Fixed("norm", "layernorm", "layernorm"),
        FieldPair("layernorm_epsilon", "layer_norm_epsilon", 1e-5, 1e-5),
        Fixed("use_bias_in_norms", True, True),
        Fixed("use_bias_in_attn_linear", True, True),
        Fixed("use_bias_in_mlp", True, True),
        Fixed("gpt_j_residual", False, False),
        Not("no_weight_tying", "tie_word_embeddings", True, False),
        FieldPair("hidden_dropout", "resid_pdrop", 0.1, 0.0, also=("embd_pdrop",)),
        FieldPair("attention_dropout", "attn_pdrop", 0.1, 0.0),
        *NO_WINDOWS,
        Theirs("scale_attn_weights", True, True),
        Theirs("scale_attn_by_inverse_layer_idx", False, False),
        Theirs("add_cross_attention", False, False),
        Theirs("architectures", ["GPT2LMHeadModel"], ["GPT2LMHeadModel"], written=True),
    ),
)
