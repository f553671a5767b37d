# SPDX-License-Identifier: Apache-2.0
"""LLaMA, and the families that are built like it: Mistral, Qwen, OLMo."""

from __future__ import annotations

from megatron.checkpoint.mapping.config_rows import Act, Config, ConfigRow, FieldPair, Fixed, Heads, Length, Not, Theirs, Width
from megatron.checkpoint.mapping.ops import Concat, FuseQKV, PadVocab
from megatron.checkpoint.mapping.position_rows import FULL, SLIDING, LayerWindows, Rope, Window
from megatron.checkpoint.mapping.rows import (
    COMMON,
    GATED_ACTIVATIONS,
    NO_WINDOWS,
    ONE_ATTENTION_BIAS,
    PLAIN_NORMS,
    Family,
    Row,
    attention_bias,
    mlp_bias,
    untied,
)

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

QKV_BIAS_ROWS = (
    Row(
        B + "attention.query_key_value.bias",
        (L + "self_attn.q_proj.bias", L + "self_attn.k_proj.bias", L + "self_attn.v_proj.bias"),
        FuseQKV(),
        when=attention_bias,
    ),
)

ATTENTION_BIAS_ROWS = (*QKV_BIAS_ROWS, Row(B + "attention.dense.bias", L + "self_attn.o_proj.bias", when=attention_bias))

MLP_BIAS_ROWS = (
    Row(B + "mlp.linear1.bias", (L + "mlp.up_proj.bias", L + "mlp.gate_proj.bias"), Concat(0, 2), when=mlp_bias),
    Row(B + "mlp.linear2.bias", L + "mlp.down_proj.bias", when=mlp_bias),
)

IGNORED = (r"rotary_emb\.inv_freq$",)


def decoder_config(
    architecture: str, *, kv_heads: int | None = None, epsilon: float = 1e-6, head_dim: int | None = None
) -> tuple[ConfigRow, ...]:
    """What LLaMA and its relatives say alike, but for rotary positions. The last three: what an absent field means there."""
    return (
        *COMMON,
        FieldPair("hidden_size", "hidden_size"),
        FieldPair("num_layers", "num_hidden_layers"),
        FieldPair("num_attention_heads", "num_attention_heads"),
        FieldPair("num_kv_heads", "num_key_value_heads", kv_heads),
        FieldPair("padded_vocab_size", "vocab_size"),
        Length(),
        Heads(default=head_dim),
        Width(),
        Act(GATED_ACTIVATIONS),
        Fixed("norm", "rmsnorm", "layernorm"),
        FieldPair("rms_norm_epsilon", "rms_norm_eps", epsilon, 1e-8),
        Fixed("use_bias_in_norms", False, True),
        Fixed("gpt_j_residual", False, False),
        Not("no_weight_tying", "tie_word_embeddings", False, False),
        Fixed("hidden_dropout", 0.0, 0.0),
        FieldPair("attention_dropout", "attention_dropout", 0.0, 0.0),
        Theirs("architectures", [architecture], [architecture], written=True),
    )


# Whether all four projections of attention have biases.
ATTENTION_BIAS_CONFIG: tuple[ConfigRow, ...] = (FieldPair("use_bias_in_attn_linear", "attention_bias", False, True), ONE_ATTENTION_BIAS)
NO_MLP_BIAS = Fixed("use_bias_in_mlp", False, True)

LLAMA = Family(
    name="llama",
    hf="LlamaForCausalLM",
    model_type="llama",
    prefix="model.",
    ignored=IGNORED,
    tied_alias="lm_head.weight",
    rows=(*EMBEDDING_ROWS, *PRE_NORM_ROWS, *ATTENTION_ROWS, *MLP_ROWS, *ATTENTION_BIAS_ROWS, *MLP_BIAS_ROWS, *HEAD_ROWS),
    config=(
        *decoder_config("LlamaForCausalLM"),
        *PLAIN_NORMS,
        *NO_WINDOWS,
        Rope(),
        *ATTENTION_BIAS_CONFIG,
        FieldPair("use_bias_in_mlp", "mlp_bias", False, True),
    ),
)


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
