# SPDX-License-Identifier: Apache-2.0
"""GPT-NeoX and GPT-2; LLaMA and the families that are built like it: Mistral, Qwen, OLMo."""

from __future__ import annotations

from megatron.checkpoint.mapping.config_rows import Act, Config, ConfigRow, FieldPair, Fixed, Heads, Length, Not, Theirs, Width
from megatron.checkpoint.mapping.ops import Chain, Chunk, Concat, FuseQKV, PadVocab, Transpose
from megatron.checkpoint.mapping.position_rows import FULL, SLIDING, LayerWindows, Rope, Window
from megatron.checkpoint.mapping.rows import (
    COMMON,
    NO_WINDOWS,
    ONE_ATTENTION_BIAS,
    PLAIN_NORMS,
    Family,
    Row,
    attention_bias,
    mlp_bias,
    rms_norms,
    sizes,
    untied,
    with_bias,
)

Rows = tuple[Row, ...]
Configs = tuple[ConfigRow, ...]

GATED_ACTIVATIONS = (("swiglu", "silu"), ("geglu", "gelu"), ("reglu", "relu"), ("bilinear", "linear"), ("glu", "sigmoid"))

B = "{slot}."
L = "model.layers.{layer}."

EMBEDDING_ROWS = (Row("0.word_embeddings.weight", "model.embed_tokens.weight", PadVocab()),)
PRE_NORM_ROWS = (
    Row(B + "input_layernorm.scale", L + "input_layernorm.weight"),
    Row(B + "post_attention_layernorm.scale", L + "post_attention_layernorm.weight"),
)
QK_NORM_ROWS = (
    Row(B + "attention.q_norm.scale", L + "self_attn.q_norm.weight"),
    Row(B + "attention.k_norm.scale", L + "self_attn.k_norm.weight"),
)
# linear1 is [value; gate], and theirs calls the value `up`.
(QKV_ROW, QKV_BIAS_ROW), (DENSE_ROW, DENSE_BIAS_ROW), (LINEAR1_ROW, LINEAR1_BIAS_ROW), (LINEAR2_ROW, LINEAR2_BIAS_ROW) = (
    with_bias(B + "attention.query_key_value", tuple(f"{L}self_attn.{part}_proj." for part in "qkv"), FuseQKV(), when=attention_bias),
    with_bias(B + "attention.dense", L + "self_attn.o_proj.", when=attention_bias),
    with_bias(B + "mlp.linear1", (L + "mlp.up_proj.", L + "mlp.gate_proj."), Concat(0, 2), when=mlp_bias),
    with_bias(B + "mlp.linear2", L + "mlp.down_proj.", when=mlp_bias),
)
MATRIX_ROWS = (QKV_ROW, DENSE_ROW, LINEAR1_ROW, LINEAR2_ROW)
ATTENTION_BIAS_ROWS = (QKV_BIAS_ROW, DENSE_BIAS_ROW)
HEAD_ROWS = (Row("{norm}.norm.scale", "model.norm.weight"), Row("{head}.final_linear.weight", "lm_head.weight", PadVocab(), when=untied))


def decoder(  # noqa: PLR0913
    name: str, hf: str, rows: Rows, config: Configs, *, kv_heads: int | None = None, epsilon: float = 1e-6, head_dim: int | None = None
) -> Family:
    """LLaMA or a relative. config: what not all of them say alike; the last three: what an absent field means there"""
    return Family(
        name=name,
        hf=hf,
        model_type=name,
        prefix="model.",
        ignored=(r"rotary_emb\.inv_freq$",),
        tied_alias="lm_head.weight",
        rows=rows,
        config=(
            *COMMON,
            *sizes("hidden_size", "num_hidden_layers", "num_attention_heads", FieldPair("num_kv_heads", "num_key_value_heads", kv_heads)),
            Length(),
            Heads(default=head_dim),
            Width(),
            Act(GATED_ACTIVATIONS),
            *rms_norms("rms_norm_eps", epsilon),
            Fixed("gpt_j_residual", False, False),
            Not("no_weight_tying", "tie_word_embeddings", False, False),
            Fixed("hidden_dropout", 0.0, 0.0),
            FieldPair("attention_dropout", "attention_dropout", 0.0, 0.0),
            Theirs("architectures", [hf], [hf], written=True),
            *config,
        ),
    )


def usual_types(config: Config) -> list[str]:
    """Types of layers that a config means which does not list them: the last ones slide, if any."""
    first = config.get("max_window_layers", 28) if config.get("use_sliding_window", False) else config["num_hidden_layers"]
    return [SLIDING if index >= first else FULL for index in range(config["num_hidden_layers"])]


def three_of_four(config: Config) -> list[str]:
    """Types of layers that a config means which does not list them: every fourth sees everything."""
    return [SLIDING if (index + 1) % 4 else FULL for index in range(config["num_hidden_layers"])]


# Whether all four projections of attention have biases.
ATTENTION_BIAS: Configs = (FieldPair("use_bias_in_attn_linear", "attention_bias", False, True), ONE_ATTENTION_BIAS)
NO_MLP_BIAS = Fixed("use_bias_in_mlp", False, True)
WINDOWS = LayerWindows(usual_types, switch="use_sliding_window")
COMMON_ROWS = (*EMBEDDING_ROWS, *PRE_NORM_ROWS, *MATRIX_ROWS, *HEAD_ROWS)
MLP_BIAS_ROWS = (LINEAR1_BIAS_ROW, LINEAR2_BIAS_ROW)


def qk_norms(placement: str, *, each_head: bool) -> Configs:
    """Queries and keys have norms of their own. placement: of the norms of the sublayers"""
    return (
        Fixed("norm_placement", placement, "pre"),
        Fixed("use_qk_layernorm", True, False),
        Fixed("use_separate_qk_norms", True, False),
        Fixed("qk_norm_each_head", each_head, False),
    )


NO_ATTENTION_BIAS = (Fixed("use_bias_in_attn_linear", False, True), ONE_ATTENTION_BIAS)
QKV_BIAS = (Fixed("use_bias_in_attn_linear", True, True), Fixed("use_bias_in_attn_output", False, None))
MLP_BIAS = FieldPair("use_bias_in_mlp", "mlp_bias", False, True)

LLAMA_ROWS = (*EMBEDDING_ROWS, *PRE_NORM_ROWS, *MATRIX_ROWS, *ATTENTION_BIAS_ROWS, *MLP_BIAS_ROWS, *HEAD_ROWS)
LLAMA_CONFIG = (*PLAIN_NORMS, *NO_WINDOWS, Rope(), *ATTENTION_BIAS, MLP_BIAS)
LLAMA = decoder("llama", "LlamaForCausalLM", LLAMA_ROWS, LLAMA_CONFIG)

MISTRAL_CONFIG = (*PLAIN_NORMS, Rope(), Window(default=4096), *NO_ATTENTION_BIAS, NO_MLP_BIAS)
MISTRAL = decoder("mistral", "MistralForCausalLM", COMMON_ROWS, MISTRAL_CONFIG, kv_heads=8)

QWEN2_CONFIG = (*PLAIN_NORMS, Rope(), WINDOWS, *QKV_BIAS, NO_MLP_BIAS)
QWEN2 = decoder("qwen2", "Qwen2ForCausalLM", (*COMMON_ROWS, QKV_BIAS_ROW), QWEN2_CONFIG, kv_heads=32)

QWEN3_ROWS = (*COMMON_ROWS, *ATTENTION_BIAS_ROWS, *QK_NORM_ROWS)
QWEN3_CONFIG = (*qk_norms("pre", each_head=True), Rope(), WINDOWS, *ATTENTION_BIAS, NO_MLP_BIAS)
QWEN3 = decoder("qwen3", "Qwen3ForCausalLM", QWEN3_ROWS, QWEN3_CONFIG, kv_heads=32, head_dim=128)

# Norms after the sublayers, and of all queries and all keys.
OLMO_NORM_ROWS = (PRE_NORM_ROWS[1], Row(B + "post_feedforward_layernorm.scale", L + "post_feedforward_layernorm.weight"), *QK_NORM_ROWS)
OLMO_ROWS = (*EMBEDDING_ROWS, *OLMO_NORM_ROWS, *MATRIX_ROWS[:2], *ATTENTION_BIAS_ROWS, *MATRIX_ROWS[2:], *HEAD_ROWS)
OLMO_CONFIG = (*qk_norms("olmo3", each_head=False), *ATTENTION_BIAS, NO_MLP_BIAS)
# transformers 4 accepts no other name of the kind of scaling there
OLMO2_CONFIG = (*OLMO_CONFIG, *NO_WINDOWS, Rope(kinds=("linear",), kind_field="type"))
OLMO2 = decoder("olmo2", "Olmo2ForCausalLM", OLMO_ROWS, OLMO2_CONFIG, epsilon=1e-5)
OLMO3_CONFIG = (*OLMO_CONFIG, LayerWindows(three_of_four), Rope(layers="full"))
OLMO3 = decoder("olmo3", "Olmo3ForCausalLM", OLMO_ROWS, OLMO3_CONFIG, epsilon=1e-5)


# Our name -> theirs; the first row with a name wins in either direction.
ACTIVATIONS = (
    ("gelu", "gelu"),
    ("gelu_tanh", "gelu_new"),
    ("gelu_tanh", "gelu_pytorch_tanh"),
    ("gelu_tanh", "gelu_fast"),
    ("relu", "relu"),
    ("silu", "silu"),
    ("swish", "silu"),
    ("mish", "mish"),
)


def layer_norms(epsilon: str) -> tuple[ConfigRow, ...]:
    """Rows of a model with LayerNorms. epsilon: their field"""
    row = FieldPair("layernorm_epsilon", epsilon, 1e-5, 1e-5)
    return Fixed("norm", "layernorm", "layernorm"), row, Fixed("use_bias_in_norms", True, True)


GPT_CONFIG = (*COMMON, *PLAIN_NORMS, ONE_ATTENTION_BIAS)
NEOX = "gpt_neox.layers.{layer}."

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
        *with_bias(B + "input_layernorm", NEOX + "input_layernorm."),
        *with_bias(B + "post_attention_layernorm", NEOX + "post_attention_layernorm."),
        *with_bias(B + "attention.query_key_value", NEOX + "attention.query_key_value.", when=attention_bias),  # both interleave per head
        *with_bias(B + "attention.dense", NEOX + "attention.dense.", when=attention_bias),
        *with_bias(B + "mlp.linear1", NEOX + "mlp.dense_h_to_4h."),
        *with_bias(B + "mlp.linear2", NEOX + "mlp.dense_4h_to_h."),
        *with_bias("{norm}.norm", "gpt_neox.final_layer_norm."),
        Row("{head}.final_linear.weight", "embed_out.weight", PadVocab(), when=untied),
    ),
    config=(
        *GPT_CONFIG,
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


GPT = "transformer.h.{layer}."

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
        *with_bias(B + "input_layernorm", GPT + "ln_1."),
        *with_bias(B + "post_attention_layernorm", GPT + "ln_2."),
        *with_bias(B + "attention.query_key_value", GPT + "attn.c_attn.", QKV),
        *with_bias(B + "attention.dense", GPT + "attn.c_proj.", Transpose()),
        *with_bias(B + "mlp.linear1", GPT + "mlp.c_fc.", Transpose()),
        *with_bias(B + "mlp.linear2", GPT + "mlp.c_proj.", Transpose()),
        *with_bias("{norm}.norm", "transformer.ln_f."),
        Row("{head}.final_linear.weight", "lm_head.weight", PadVocab(), when=untied),
    ),
    config=(
        *GPT_CONFIG,
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
