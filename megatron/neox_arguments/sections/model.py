# SPDX-License-Identifier: Apache-2.0
"""Keys for the model: sizes, attention and positions, norms, MLP, residuals, other mixers, experts, muP, Transformer Engine."""

from __future__ import annotations

from typing import Any, Literal

from .base import NO_EFFECT, Block, Section, Whole, key

InitMethod = Literal[
    "normal", "scaled_normal", "orthogonal", "scaled_orthogonal", "xavier_uniform", "xavier_normal", "wang_init", "small_init",
    "single_residual_scaled_normal",
]  # fmt: skip


class SizeKeys(Section):
    """How large the model is and in which numbers it computes."""

    precision: Literal["fp16", "fp32", "bfloat16"] | None = key(
        None, "Number format of weights and activations; unset follows the fp16 and bf16 blocks, else fp32."
    )
    num_layers: Whole | None = key(None, "Number of blocks between embedding and head; required.", ge=1)
    hidden_size: Whole | None = key(None, "Width of the residual stream; required.", ge=1)
    intermediate_size: Whole | None = key(
        None, "Width of the MLP between its two projections; see intermediate_size_convention for gated activations.", ge=1
    )
    intermediate_size_convention: Literal["auto", "literal", "two_thirds"] = key(
        "auto",
        "What intermediate_size means with a gated activation: the width itself (literal), or a number of which a third is kept per half "
        "(two_thirds, as GPT-NeoX upstream); auto is literal unless the checkpoint being loaded shows the other.",
    )
    mlp_multiple_of: Whole = key(1, "A width that is computed, not given, is rounded up to a multiple of this.", ge=1)
    expansion_factor: float | None = key(
        None, "Inner width of MLP, Mamba or RWKV layers in multiples of hidden_size; excludes intermediate_size.", gt=0
    )
    num_attention_heads: Whole | None = key(None, "Number of query heads; required.", ge=1)
    seq_length: Whole | None = key(None, "Tokens per training sample; unset means max_position_embeddings.", ge=1)
    max_position_embeddings: Whole | None = key(None, "Longest sequence the model is built for, in tokens; unset means seq_length.", ge=1)
    make_vocab_size_divisible_by: Whole = key(128, "The vocabulary is padded to a multiple of this number times model_parallel_size.", ge=1)
    padded_vocab_size: Whole | None = key(
        None, "Rows of the embedding; unset follows from the tokenizer and make_vocab_size_divisible_by.", ge=1
    )


class NormKeys(Section):
    """Normalisation: which, where, and how small its epsilon."""

    norm: Literal["layernorm", "rmsnorm", "non_parametric_layernorm", "scalenorm", "te_rmsnorm", "te_layernorm"] = key(
        "layernorm", "Normalisation layer; the te_ names are Transformer Engine's."
    )
    layernorm_fusion: bool = key(False, "Ask for a fused kernel for layernorm.")
    rmsnorm_fusion: bool = key(False, "Ask for a fused kernel for rmsnorm.")
    norm_placement: Literal["pre", "post", "olmo3"] = key(
        "pre", "Norm before each sublayer (pre), after each residual sum (post), or on each sublayer's output (olmo3)."
    )
    layernorm_epsilon: float = key(1.0e-5, "Number added to the variance in LayerNorm.", gt=0)
    rms_norm_epsilon: float = key(1.0e-8, "Number added to the mean square in RMSNorm.", gt=0)
    scalenorm_epsilon: float = key(1.0e-8, "Smallest vector length that ScaleNorm divides by.", gt=0)
    use_bias_in_norms: bool = key(True, "Give LayerNorm a bias; the other norms have none.")


class MixerKeys(Section):
    """Sizes and kernels of the mixers that can stand in attention_config instead of attention."""

    mamba_selective_scan_fusion: bool = key(False, "Run Mamba's selective scan (arXiv 2312.00752) with its CUDA kernel.")
    mamba_causal_conv_fusion: bool = key(False, "Run Mamba's depthwise convolution with its CUDA kernel.")
    mamba_inner_func_fusion: bool = key(False, "Run convolution, projections and scan of a Mamba layer as one fused function.")
    mamba_selective_fp32_params: bool = key(True, "Keep the state matrix A_log and the skip weight D of Mamba layers in fp32.")
    mamba_use_bias_in_conv: bool = key(True, "Give Mamba's depthwise convolution a bias.")
    mamba_use_bias_in_linears: bool = key(False, "Give Mamba's input, x and output projections a bias.")
    dim_att: Whole | None = key(None, "Width of RWKV's time mixing; unset means hidden_size.", ge=1)
    head_size: Whole | None = key(None, "Features per head of RWKV's time mixing; unset means dim_att / num_attention_heads.", ge=1)
    ffn_dim: Whole | None = key(None, "Width of RWKV's channel mixing; unset follows from intermediate_size or expansion_factor.", ge=1)
    gmlp_attn_dim: Whole = key(64, "Features of the single small attention head in aMLP layers (arXiv 2105.08050).", ge=1)


class MoeKeys(Section):
    """How many experts there are and how tokens find them."""

    moe_num_experts: Whole = key(1, "Experts in a mixture-of-experts layer; 1 means ordinary MLPs.", ge=1)
    moe_expert_interval: Whole = key(1, "Every so-manieth layer, counted from layer 0, holds experts.", ge=1)
    moe_top_k: Whole = key(1, "Experts that process each token.", ge=1)
    moe_router_type: Literal["sinkhorn", "topk"] = key(
        "sinkhorn", "How tokens are assigned: balanced by Sinkhorn iterations, or the highest router scores."
    )
    moe_lbl_in_fp32: bool = key(False, "Form the load-balancing loss in fp32.", NO_EFFECT)
    moe_jitter_eps: float | None = key(None, "Training noise on router inputs: a uniform factor in [1 - eps, 1 + eps].", gt=0, lt=1)


class MupKeys(Section):
    """Width-independent hyper-parameters (arXiv 2203.03466)."""

    use_mup: bool = key(False, "Scale initialisation, learning rates, attention and logits by the muP rules; needs mup_base_hidden_size.")
    mup_base_hidden_size: Whole | None = key(
        None, "The hidden_size at which learning rate and init_method_std were found: use_mup keeps them right for hidden_size.", ge=1
    )
    coord_check: bool = key(False, "Measure how activations grow with width: a command of its own, python tools/mup/coord_check.py CONF...")
    save_base_shapes: bool = key(False, "Write muP base shapes: not needed, the laws follow from mup_base_hidden_size.", NO_EFFECT)
    base_shapes_file: str | None = key(None, "File with muP base shapes: not needed, the laws follow from mup_base_hidden_size.", NO_EFFECT)
    mup_init_scale: float = key(1.0, "Factor on the standard deviation of all matrices under muP.", gt=0)
    mup_attn_temp: float = key(1.0, "Temperature under muP that attention scores are divided by, beside the head size.", gt=0)
    mup_output_temp: float = key(1.0, "Temperature under muP that the output logits are divided by.", gt=0)
    mup_embedding_mult: float = key(1.0, "Factor on the token embedding's output under muP.", gt=0)
    mup_rp_embedding_mult: float = key(1.0, "Factor on position embeddings, with or without muP.", gt=0)
    mup_width_scale: Whole = key(2, "Width of a muP delta model in base widths: no delta model is needed.", NO_EFFECT, ge=2)


class TransformerEngineKeys(Section):
    """Which layers run in Transformer Engine, and its FP8 recipe."""

    te_columnparallel: bool = key(False, "Build the linear layers whose outputs are split over ranks from Transformer Engine.")
    te_rowparallel: bool = key(False, "Build the linear layers whose inputs are split over ranks from Transformer Engine.")
    te_layernorm_mlp: bool = key(False, "Run the second norm and the MLP as Transformer Engine's one fused module.")
    te_mha: bool = key(False, "Run attention as Transformer Engine's module.")
    te_fp8_format: Literal["e4m3", "hybrid"] = key(
        "hybrid", "FP8 numbers used: e4m3 everywhere, or hybrid with e5m2 in the backward pass (arXiv 2209.05433)."
    )
    te_fp8_wgrad: bool = key(True, "Form weight gradients in FP8 too.")
    te_fp8_amax_history_len: Whole = key(1, "Number of past steps whose largest magnitudes set the FP8 scale.", ge=1)
    te_fp8_amax_compute_algo: Literal["most_recent", "max"] = key(
        "most_recent", "Which of the remembered largest magnitudes sets the FP8 scale."
    )
    te_fp8_margin: Whole = key(0, "Powers of two kept free between the largest value and the FP8 range.")
    te_fp8_mha: bool = key(False, "Use FP8 inside attention as well.")


class ModelArgs(SizeKeys, NormKeys, MixerKeys, TransformerEngineKeys, MupKeys, MoeKeys):
    """The model apart from attention."""

    no_weight_tying: bool = key(False, "Give the output head a weight of its own; otherwise it is the embedding's.")
    num_unique_layers: Whole | None = key(None, "Number of layers with weights of their own.", NO_EFFECT, ge=1)
    param_sharing_style: Literal["grouped", "spaced"] = key("grouped", "Order in which layers share weights.", NO_EFFECT)
    activation: Literal["gelu", "geglu", "relu", "softsign", "swish", "mish", "silu", "reglu", "swiglu", "bilinear", "glu"] = key(
        "gelu", "Nonlinearity of the MLP; geglu, reglu, swiglu, bilinear and glu are gated and double its first projection."
    )
    use_flashattn_swiglu: bool = key(False, "Use the SwiGLU kernel of the flash-attn package.")
    bias_gelu_fusion: bool = key(False, "Use the tanh approximation of GELU, fused with the bias.")
    bias_dropout_fusion: bool = key(False, "Fuse bias, dropout and residual sum.")
    fp16_lm_cross_entropy: bool = key(False, "Form the loss in half precision; needs precision fp16.")
    logits_block_rows: Whole = key(
        0, "Rows of logits the head forms at a time, in tokens; 0 lets the head choose. Smaller needs less memory.", ge=0
    )
    init_method_std: float = key(0.02, "Standard deviation of the initialisers of the normal family.", gt=0)
    use_cpu_initialization: bool = key(False, "Draw initial weights on the CPU and move them afterwards.")
    init_method: InitMethod = key("normal", "Initialiser of every weight that does not write into the residual stream.")
    output_layer_init_method: InitMethod = key(
        "scaled_normal", "Initialiser of the weights that write into the residual stream (attention output, second MLP projection)."
    )
    gpt_j_residual: bool = key(False, "Add attention and MLP of a block in parallel, both reading the block's input.")
    gpt_j_tied: bool = key(False, "With gpt_j_residual, let attention and MLP read the same normed input.")
    use_bias_in_attn_linear: bool = key(True, "Give the projections of attention a bias.")
    use_bias_in_attn_output: bool | None = key(
        None, "Give the output projection of attention a bias; unset means as use_bias_in_attn_linear."
    )
    use_bias_in_mlp: bool = key(True, "Give the projections of the MLP a bias.")
    soft_prompt_tuning: Block = key(None, "Train only a learned prefix (arXiv 2104.08691): enabled, n_tokens, init_string, init_range.")
    output_layer_parallelism: Literal["column"] = key(
        "column", "How the head is split over tensor-parallel ranks: by vocabulary rows, the only way there is."
    )
    hidden_dropout: float = key(0.0, "Dropout probability after the embedding and after each sublayer.", ge=0, lt=1)
    onnx_safe: bool = key(False, "Write GELU with erf, in a form that ONNX export understands.")

    @property
    def width_mult(self) -> float:
        """How many times wider the model is than the one its hyper-parameters were found on; 1 without muP."""
        return self.hidden_size / self.mup_base_hidden_size if self.use_mup and self.hidden_size and self.mup_base_hidden_size else 1.0


class AttentionArgs(Section):
    """Which tokens see which, and with what positions."""

    num_kv_heads: Whole | None = key(
        None, "Key and value heads (grouped queries: arXiv 2305.13245); unset means num_attention_heads.", ge=1
    )
    head_dim: Whole | None = key(None, "Features of one head; unset means hidden_size / num_attention_heads.", ge=1)
    sliding_window_width: Whole | None = key(None, "How many tokens behind itself a token sees, in every layer; unset means all.", ge=1)
    sliding_window_pattern: list[Whole | None] | None = key(
        None,
        "Window widths in tokens, repeated over the layers, null for full attention: [4095, 4095, 4095, null]; where given, it wins over "
        "sliding_window_width.",
    )
    attention_over_documents: Literal["joined", "isolated"] | None = key(
        None,
        "Whether documents packed into one row see each other (joined) or not, with positions restarting (isolated); unset is isolated "
        "with labels, rewards, pairs or an objective other than language modelling, else joined.",
    )
    attention_backend: Literal["auto", "eager", "sdpa", "varlen", "flash_attn"] = key(
        "auto", "Implementation of attention; auto picks the fastest exact one that is available."
    )
    use_qk_layernorm: bool = key(False, "Normalise queries and keys before positions are applied (arXiv 2302.05442).")
    use_separate_qk_norms: bool = key(False, "With use_qk_layernorm, give queries and keys a norm each, over all heads at once.")
    qk_norm_each_head: bool = key(False, "With use_separate_qk_norms, normalise each head by itself, with one scale for all heads.")
    pos_emb: Literal["learned", "rotary", "sinusoidal", "rpe", "alibi", "none"] = key(
        "learned", "Positional encoding: a table, rotations (arXiv 2104.09864), T5 buckets, ALiBi (arXiv 2108.12409), ..."
    )
    rpe_num_buckets: Whole = key(32, "Number of distance buckets of pos_emb rpe.", ge=2)
    rpe_max_distance: Whole = key(128, "Distance in tokens from which on pos_emb rpe uses its last bucket.", ge=2)
    opt_pos_emb_offset: Whole = key(0, "Number added to every learned position; OPT models use 2.", ge=0)
    attention_config: list[Any] | None = key(
        None,
        "Layer types as [[[type, ...], repeats], ...] with repeats a number or 'all', or one name per layer; unset means global attention "
        "in every layer.",
    )
    sparsity_config: Block = key(None, "Options of the sparse layer types (block, num_local_blocks, ...).")
    sparse_attention: Block = key(None, "DeepSpeed's sparse attention block.")
    scaled_upper_triang_masked_softmax_fusion: bool = key(False, "Ask for the fused causal softmax kernel.")
    scaled_masked_softmax_fusion: bool = key(False, "Ask for the fused softmax kernel with an explicit mask.")
    rope_fusion: bool = key(False, "Ask for the fused rotary kernel.")
    apply_query_key_layer_scaling: bool = key(
        False, "Divide attention scores by the layer number before the softmax and multiply them inside it, which is fp32."
    )
    attention_softmax_in_fp32: bool = key(False, "Form the attention softmax in fp32 whatever the precision.")
    rotary_pct: float = key(1.0, "Fraction of each head's features that is rotated.", gt=0, le=1)
    rotary_emb_base: float = key(10000, "Base of the rotary wavelengths (theta).", gt=0)
    rope_scaling: Block = key(
        None,
        "Context extension of rotary positions in Hugging Face's form: rope_type linear, ntk, yarn (arXiv 2309.00071) or llama3, factor, "
        "original_max_position_embeddings, low_freq_factor, high_freq_factor, beta_fast, beta_slow, attention_factor.",
    )
    rope_scaling_layers: Literal["all", "full"] = key(
        "all", "Layers whose rotary positions rope_scaling changes; full are those without a sliding window."
    )
    rotary_save_freqs_buffer: bool = key(False, "Keep the rotary frequencies in checkpoints.")
    attention_dropout: float = key(0.0, "Dropout probability of attention weights.", ge=0, lt=1)
