# SPDX-License-Identifier: Apache-2.0
"""What several families share: conditions of rows, activation names, refusals."""

from __future__ import annotations

from megatron.checkpoint.mapping.config_rows import ConfigRow, Fixed, Holds, Theirs
from megatron.model.spec import ModelSpec

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

GATED_ACTIVATIONS = (("swiglu", "silu"), ("geglu", "gelu"), ("reglu", "relu"), ("bilinear", "linear"), ("glu", "sigmoid"))

# No family here can express these keys.
COMMON: tuple[ConfigRow, ...] = (
    Fixed("opt_pos_emb_offset", 0, 0),
    Fixed("use_mup", False, False),
    Fixed("mup_rp_embedding_mult", 1.0, 1.0),
    Fixed("moe_num_experts", 1, 1),
    Theirs("quantization_config", None, None),
)

# Norms before the sublayers, none on queries and keys.
PLAIN_NORMS: tuple[ConfigRow, ...] = (Fixed("norm_placement", "pre", "pre"), Fixed("use_qk_layernorm", False, False))

# All projections of attention have biases, or none has.
ONE_ATTENTION_BIAS = Holds(
    "use_bias_in_attn_output",
    lambda spec: spec.blocks[0].attention.output_bias == spec.blocks[0].attention.bias,
    "leave it out, so that it is as use_bias_in_attn_linear",
)

NO_WINDOWS: tuple[ConfigRow, ...] = (Fixed("sliding_window_width", None, None), Fixed("sliding_window_pattern", None, None))


def untied(spec: ModelSpec) -> bool:
    """Whether the head has a matrix of its own."""
    return not spec.tied


def attention_bias(spec: ModelSpec) -> bool:
    """Whether the attention projections have biases."""
    return spec.blocks[0].attention.bias


def output_bias(spec: ModelSpec) -> bool:
    """Whether the output projection of attention has a bias."""
    return spec.blocks[0].attention.output_bias


def mlp_bias(spec: ModelSpec) -> bool:
    """Whether the MLP projections have biases."""
    return spec.blocks[0].mlp.bias
