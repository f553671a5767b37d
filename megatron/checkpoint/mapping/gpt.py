# SPDX-License-Identifier: Apache-2.0
"""GPT-NeoX and GPT-2."""

from __future__ import annotations

from megatron.checkpoint.mapping.config_rows import Act, FieldPair, Fixed, Heads, Length, Not, Theirs, Width
from megatron.checkpoint.mapping.ops import Chain, Chunk, FuseQKV, PadVocab, Transpose
from megatron.checkpoint.mapping.position_rows import Rope
from megatron.checkpoint.mapping.rows import (
    ACTIVATIONS,
    COMMON,
    NO_WINDOWS,
    ONE_ATTENTION_BIAS,
    PLAIN_NORMS,
    Family,
    Row,
    attention_bias,
    layer_norms,
    sizes,
    untied,
    with_bias,
)

B = "{slot}."
L = "gpt_neox.layers.{layer}."

GPT_NEOX = Family(
    name="neox",
    hf="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    prefix="gpt_neox.",
    ignored=(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$", r"^gpt_neox\.rotary_emb\.inv_freq$"),
    tied_alias="embed_out.weight",
    renamed=(("lm_head.weight", "embed_out.weight"),),  # of live models in transformers 5; its files keep the old name
    rows=(
        Row("0.word_embeddings.weight", "gpt_neox.embed_in.weight", PadVocab()),
        *with_bias(B + "input_layernorm", L + "input_layernorm."),
        *with_bias(B + "post_attention_layernorm", L + "post_attention_layernorm."),
        *with_bias(B + "attention.query_key_value", L + "attention.query_key_value.", when=attention_bias),  # both interleave per head
        *with_bias(B + "attention.dense", L + "attention.dense.", when=attention_bias),
        *with_bias(B + "mlp.linear1", L + "mlp.dense_h_to_4h."),
        *with_bias(B + "mlp.linear2", L + "mlp.dense_4h_to_h."),
        *with_bias("{norm}.norm", "gpt_neox.final_layer_norm."),
        Row("{head}.final_linear.weight", "embed_out.weight", PadVocab(), when=untied),
    ),
    config=(
        *COMMON,
        *PLAIN_NORMS,
        ONE_ATTENTION_BIAS,
        *sizes("hidden_size", "num_hidden_layers", "num_attention_heads"),
        Length(),
        Heads(free=False),
        Width(),
        Act(ACTIVATIONS),
        Rope("rotary_emb_base", "rotary_pct"),
        *layer_norms("layer_norm_eps"),
        FieldPair("use_bias_in_attn_linear", "attention_bias", True, True),
        Fixed("use_bias_in_mlp", True, True),
        FieldPair("gpt_j_residual", "use_parallel_residual", True, False),
        Fixed("gpt_j_tied", False, False),
        Not("no_weight_tying", "tie_word_embeddings", False, False),
        FieldPair("hidden_dropout", "hidden_dropout", 0.0, 0.0),
        FieldPair("attention_dropout", "attention_dropout", 0.0, 0.0),
        *NO_WINDOWS,
        Theirs("architectures", ["GPTNeoXForCausalLM"], ["GPTNeoXForCausalLM"], written=True),
    ),
)


H = "transformer.h.{layer}."

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
        *with_bias(B + "input_layernorm", H + "ln_1."),
        *with_bias(B + "post_attention_layernorm", H + "ln_2."),
        *with_bias(B + "attention.query_key_value", H + "attn.c_attn.", QKV),
        *with_bias(B + "attention.dense", H + "attn.c_proj.", Transpose()),
        *with_bias(B + "mlp.linear1", H + "mlp.c_fc.", Transpose()),
        *with_bias(B + "mlp.linear2", H + "mlp.c_proj.", Transpose()),
        *with_bias("{norm}.norm", "transformer.ln_f."),
        Row("{head}.final_linear.weight", "lm_head.weight", PadVocab(), when=untied),
    ),
    config=(
        *COMMON,
        *PLAIN_NORMS,
        ONE_ATTENTION_BIAS,
        *sizes("n_embd", "n_layer", "n_head"),
        Length("n_positions"),
        Heads("n_embd", "n_head", free=False),
        Width("n_inner"),
        Act(ACTIVATIONS, "activation_function"),
        Fixed("pos_emb", "learned", "learned"),
        *layer_norms("layer_norm_epsilon"),
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
