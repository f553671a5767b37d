# SPDX-License-Identifier: Apache-2.0
"""Keys for the model apart from attention: sizes, norms, MLP, residuals, other mixers, experts, muP, Transformer Engine."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .base import NO_EFFECT, Section, Whole

InitMethod = Literal[
    "normal",
    "scaled_normal",
    "orthogonal",
    "scaled_orthogonal",
    "xavier_uniform",
    "xavier_normal",
    "wang_init",
    "small_init",
    "single_residual_scaled_normal",
]


class SizeKeys(Section):
    """How large the model is and in which numbers it computes."""

    precision: Literal["fp16", "fp32", "bfloat16"] | None = Field(
        None, description="Number format of weights and activations; unset follows the fp16 and bf16 blocks, else fp32."
    )
    num_layers: Whole | None = Field(None, ge=1, description="Number of blocks between embedding and head; required.")
    hidden_size: Whole | None = Field(None, ge=1, description="Width of the residual stream; required.")
    intermediate_size: Whole | None = Field(
        None, ge=1, description="Width of the MLP between its two projections; see intermediate_size_convention for gated activations."
    )
    intermediate_size_convention: Literal["auto", "literal", "two_thirds"] = Field(
        "auto",
        description=(
            "What intermediate_size means with a gated activation: the width itself (literal), or a number of which a third "
            "is kept per half (two_thirds, as GPT-NeoX upstream); auto is literal unless the checkpoint being loaded shows the other."
        ),
    )
    mlp_multiple_of: Whole = Field(1, ge=1, description="A width that is computed, not given, is rounded up to a multiple of this.")
    expansion_factor: float | None = Field(
        None, gt=0, description="Inner width of MLP, Mamba or RWKV layers in multiples of hidden_size; excludes intermediate_size."
    )
    num_attention_heads: Whole | None = Field(None, ge=1, description="Number of query heads; required.")
    seq_length: Whole | None = Field(None, ge=1, description="Tokens per training sample; unset means max_position_embeddings.")
    max_position_embeddings: Whole | None = Field(
        None, ge=1, description="Longest sequence the model is built for, in tokens; unset means seq_length."
    )
    make_vocab_size_divisible_by: Whole = Field(
        128, ge=1, description="The vocabulary is padded to a multiple of this number times model_parallel_size."
    )
    padded_vocab_size: Whole | None = Field(
        None, ge=1, description="Rows of the embedding; unset follows from the tokenizer and make_vocab_size_divisible_by."
    )


class NormKeys(Section):
    """Normalisation: which, where, and how small its epsilon."""

    norm: Literal["layernorm", "rmsnorm", "non_parametric_layernorm", "scalenorm", "te_rmsnorm", "te_layernorm"] = Field(
        "layernorm", description="Normalisation layer; the te_ names are Transformer Engine's."
    )
    layernorm_fusion: bool = Field(False, description="Ask for a fused kernel for layernorm.")
    rmsnorm_fusion: bool = Field(False, description="Ask for a fused kernel for rmsnorm.")
    norm_placement: Literal["pre", "post", "olmo3"] = Field(
        "pre", description="Norm before each sublayer (pre), after each residual sum (post), or on each sublayer's output (olmo3)."
    )
    layernorm_epsilon: float = Field(1.0e-5, gt=0, description="Number added to the variance in LayerNorm.")
    rms_norm_epsilon: float = Field(1.0e-8, gt=0, description="Number added to the mean square in RMSNorm.")
    scalenorm_epsilon: float = Field(1.0e-8, gt=0, description="Smallest vector length that ScaleNorm divides by.")
    use_bias_in_norms: bool = Field(True, description="Give LayerNorm a bias; the other norms have none.")


class MixerKeys(Section):
    """Sizes and kernels of the mixers that can stand in attention_config instead of attention."""

    mamba_selective_scan_fusion: bool = Field(False, description="Run Mamba's selective scan (arXiv 2312.00752) with its CUDA kernel.")
    mamba_causal_conv_fusion: bool = Field(False, description="Run Mamba's depthwise convolution with its CUDA kernel.")
    mamba_inner_func_fusion: bool = Field(
        False, description="Run convolution, projections and scan of a Mamba layer as one fused function."
    )
    mamba_selective_fp32_params: bool = Field(
        True, description="Keep the state matrix A_log and the skip weight D of Mamba layers in fp32."
    )
    mamba_use_bias_in_conv: bool = Field(True, description="Give Mamba's depthwise convolution a bias.")
    mamba_use_bias_in_linears: bool = Field(False, description="Give Mamba's input, x and output projections a bias.")
    dim_att: Whole | None = Field(None, ge=1, description="Width of RWKV's time mixing; unset means hidden_size.")
    head_size: Whole | None = Field(
        None, ge=1, description="Features per head of RWKV's time mixing; unset means dim_att / num_attention_heads."
    )
    ffn_dim: Whole | None = Field(
        None, ge=1, description="Width of RWKV's channel mixing; unset follows from intermediate_size or expansion_factor."
    )
    gmlp_attn_dim: Whole = Field(64, ge=1, description="Features of the single small attention head in aMLP layers (arXiv 2105.08050).")


class MoeKeys(Section):
    """How many experts there are and how tokens find them."""

    moe_num_experts: Whole = Field(1, ge=1, description="Experts in a mixture-of-experts layer; 1 means ordinary MLPs.")
    moe_expert_interval: Whole = Field(1, ge=1, description="Every so-manieth layer, counted from layer 0, holds experts.")
    moe_top_k: Whole = Field(1, ge=1, description="Experts that process each token.")
    moe_router_type: Literal["sinkhorn", "topk"] = Field(
        "sinkhorn", description="How tokens are assigned: balanced by Sinkhorn iterations, or the highest router scores."
    )
    moe_lbl_in_fp32: bool = Field(False, description="Form the load-balancing loss in fp32.", json_schema_extra=NO_EFFECT)
    moe_jitter_eps: float | None = Field(
        None, gt=0, lt=1, description="Training noise on router inputs: a uniform factor in [1 - eps, 1 + eps]."
    )


class MupKeys(Section):
    """Width-independent hyper-parameters (arXiv 2203.03466)."""

    use_mup: bool = Field(
        False,
        description="Scale initialisation, learning rates, attention and logits by the muP rules; needs mup_base_hidden_size.",
    )
    mup_base_hidden_size: Whole | None = Field(
        None,
        ge=1,
        description="The hidden_size at which learning rate and init_method_std were found: use_mup keeps them right for hidden_size.",
    )
    coord_check: bool = Field(
        False, description="Measure how activations grow with width: a command of its own, python tools/mup/coord_check.py CONF..."
    )
    save_base_shapes: bool = Field(
        False, description="Write muP base shapes: not needed, the laws follow from mup_base_hidden_size.", json_schema_extra=NO_EFFECT
    )
    base_shapes_file: str | None = Field(
        None, description="File with muP base shapes: not needed, the laws follow from mup_base_hidden_size.", json_schema_extra=NO_EFFECT
    )
    mup_init_scale: float = Field(1.0, gt=0, description="Factor on the standard deviation of all matrices under muP.")
    mup_attn_temp: float = Field(1.0, gt=0, description="Temperature under muP that attention scores are divided by, beside the head size.")
    mup_output_temp: float = Field(1.0, gt=0, description="Temperature under muP that the output logits are divided by.")
    mup_embedding_mult: float = Field(1.0, gt=0, description="Factor on the token embedding's output under muP.")
    mup_rp_embedding_mult: float = Field(1.0, gt=0, description="Factor on position embeddings, with or without muP.")
    mup_width_scale: Whole = Field(
        2,
        ge=2,
        description="Width of a muP delta model in base widths: no delta model is needed.",
        json_schema_extra=NO_EFFECT,
    )


class TransformerEngineKeys(Section):
    """Which layers run in Transformer Engine, and its FP8 recipe."""

    te_columnparallel: bool = Field(
        False, description="Build the linear layers whose outputs are split over ranks from Transformer Engine."
    )
    te_rowparallel: bool = Field(False, description="Build the linear layers whose inputs are split over ranks from Transformer Engine.")
    te_layernorm_mlp: bool = Field(False, description="Run the second norm and the MLP as Transformer Engine's one fused module.")
    te_mha: bool = Field(False, description="Run attention as Transformer Engine's module.")
    te_fp8_format: Literal["e4m3", "hybrid"] = Field(
        "hybrid", description="FP8 numbers used: e4m3 everywhere, or hybrid with e5m2 in the backward pass (arXiv 2209.05433)."
    )
    te_fp8_wgrad: bool = Field(True, description="Form weight gradients in FP8 too.")
    te_fp8_amax_history_len: Whole = Field(1, ge=1, description="Number of past steps whose largest magnitudes set the FP8 scale.")
    te_fp8_amax_compute_algo: Literal["most_recent", "max"] = Field(
        "most_recent", description="Which of the remembered largest magnitudes sets the FP8 scale."
    )
    te_fp8_margin: Whole = Field(0, description="Powers of two kept free between the largest value and the FP8 range.")
    te_fp8_mha: bool = Field(False, description="Use FP8 inside attention as well.")


class ModelArgs(SizeKeys, NormKeys, MixerKeys, TransformerEngineKeys, MupKeys, MoeKeys):
    """The model apart from attention."""

    no_weight_tying: bool = Field(False, description="Give the output head a weight of its own; otherwise it is the embedding's.")
    num_unique_layers: Whole | None = Field(
        None, ge=1, description="Number of layers with weights of their own.", json_schema_extra=NO_EFFECT
    )
    param_sharing_style: Literal["grouped", "spaced"] = Field(
        "grouped", description="Order in which layers share weights.", json_schema_extra=NO_EFFECT
    )
    activation: Literal["gelu", "geglu", "relu", "softsign", "swish", "mish", "silu", "reglu", "swiglu", "bilinear", "glu"] = Field(
        "gelu", description="Nonlinearity of the MLP; geglu, reglu, swiglu, bilinear and glu are gated and double its first projection."
    )
    use_flashattn_swiglu: bool = Field(False, description="Use the SwiGLU kernel of the flash-attn package.")
    bias_gelu_fusion: bool = Field(False, description="Use the tanh approximation of GELU, fused with the bias.")
    bias_dropout_fusion: bool = Field(False, description="Fuse bias, dropout and residual sum.")
    fp16_lm_cross_entropy: bool = Field(False, description="Form the loss in half precision; needs precision fp16.")
    logits_block_rows: Whole = Field(
        0, ge=0, description="Rows of logits the head forms at a time, in tokens; 0 lets the head choose. Smaller needs less memory."
    )
    init_method_std: float = Field(0.02, gt=0, description="Standard deviation of the initialisers of the normal family.")
    use_cpu_initialization: bool = Field(False, description="Draw initial weights on the CPU and move them afterwards.")
    init_method: InitMethod = Field("normal", description="Initialiser of every weight that does not write into the residual stream.")
    output_layer_init_method: InitMethod = Field(
        "scaled_normal",
        description="Initialiser of the weights that write into the residual stream (attention output, second MLP projection).",
    )
    gpt_j_residual: bool = Field(False, description="Add attention and MLP of a block in parallel, both reading the block's input.")
    gpt_j_tied: bool = Field(False, description="With gpt_j_residual, let attention and MLP read the same normed input.")
    use_bias_in_attn_linear: bool = Field(True, description="Give the projections of attention a bias.")
    use_bias_in_attn_output: bool | None = Field(
        None, description="Give the output projection of attention a bias; unset means as use_bias_in_attn_linear."
    )
    use_bias_in_mlp: bool = Field(True, description="Give the projections of the MLP a bias.")
    soft_prompt_tuning: dict[str, Any] | None = Field(
        None, description="Train only a learned prefix (arXiv 2104.08691): enabled, n_tokens, init_string, init_range."
    )
    output_layer_parallelism: Literal["column"] = Field(
        "column", description="How the head is split over tensor-parallel ranks: by vocabulary rows, the only way there is."
    )
    hidden_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability after the embedding and after each sublayer.")
    onnx_safe: bool = Field(False, description="Write GELU with erf, in a form that ONNX export understands.")

    @property
    def width_mult(self) -> float:
        """How many times wider the model is than the one its hyper-parameters were found on; 1 without muP."""
        return self.hidden_size / self.mup_base_hidden_size if self.use_mup and self.hidden_size and self.mup_base_hidden_size else 1.0
