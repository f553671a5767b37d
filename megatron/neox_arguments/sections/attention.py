# SPDX-License-Identifier: Apache-2.0
"""Keys for attention: which tokens see which, with what positions, by what kernel."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .base import Section, Whole


class AttentionArgs(Section):
    """Which tokens see which, and with what positions."""

    num_kv_heads: Whole | None = Field(
        None, ge=1, description="Key and value heads (grouped queries: arXiv 2305.13245); unset means num_attention_heads."
    )
    head_dim: Whole | None = Field(None, ge=1, description="Features of one head; unset means hidden_size / num_attention_heads.")
    sliding_window_width: Whole | None = Field(
        None, ge=1, description="How many tokens behind itself a token sees, in every layer; unset means all."
    )
    sliding_window_pattern: list[Whole | None] | None = Field(
        None,
        description=(
            "Window widths in tokens, repeated over the layers, null for full attention: [4095, 4095, 4095, null]; "
            "where given, it wins over sliding_window_width."
        ),
    )
    attention_over_documents: Literal["joined", "isolated"] | None = Field(
        None,
        description=(
            "Whether documents packed into one row see each other (joined) or not, with positions restarting (isolated); "
            "unset is isolated with labels, rewards, pairs or an objective other than language modelling, else joined."
        ),
    )
    attention_backend: Literal["auto", "eager", "sdpa", "varlen", "flash_attn"] = Field(
        "auto", description="Implementation of attention; auto picks the fastest exact one that is available."
    )
    use_qk_layernorm: bool = Field(False, description="Normalise queries and keys before positions are applied (arXiv 2302.05442).")
    use_separate_qk_norms: bool = Field(
        False, description="With use_qk_layernorm, give queries and keys a norm each, over all heads at once."
    )
    qk_norm_each_head: bool = Field(
        False, description="With use_separate_qk_norms, normalise each head by itself, with one scale for all heads."
    )
    pos_emb: Literal["learned", "rotary", "sinusoidal", "rpe", "alibi", "none"] = Field(
        "learned", description="Positional encoding: a table, rotations (arXiv 2104.09864), T5 buckets, ALiBi (arXiv 2108.12409), ..."
    )
    rpe_num_buckets: Whole = Field(32, ge=2, description="Number of distance buckets of pos_emb rpe.")
    rpe_max_distance: Whole = Field(128, ge=2, description="Distance in tokens from which on pos_emb rpe uses its last bucket.")
    opt_pos_emb_offset: Whole = Field(0, ge=0, description="Number added to every learned position; OPT models use 2.")
    attention_config: list[Any] | None = Field(
        None,
        description=(
            "Layer types as [[[type, ...], repeats], ...] with repeats a number or 'all', or one name per layer; "
            "unset means global attention in every layer."
        ),
    )
    sparsity_config: dict[str, Any] | None = Field(None, description="Options of the sparse layer types (block, num_local_blocks, ...).")
    sparse_attention: dict[str, Any] | None = Field(None, description="DeepSpeed's sparse attention block.")
    scaled_upper_triang_masked_softmax_fusion: bool = Field(False, description="Ask for the fused causal softmax kernel.")
    scaled_masked_softmax_fusion: bool = Field(False, description="Ask for the fused softmax kernel with an explicit mask.")
    rope_fusion: bool = Field(False, description="Ask for the fused rotary kernel.")
    apply_query_key_layer_scaling: bool = Field(
        False, description="Divide attention scores by the layer number before the softmax and multiply them inside it, which is fp32."
    )
    attention_softmax_in_fp32: bool = Field(False, description="Form the attention softmax in fp32 whatever the precision.")
    rotary_pct: float = Field(1.0, gt=0, le=1, description="Fraction of each head's features that is rotated.")
    rotary_emb_base: float = Field(10000, gt=0, description="Base of the rotary wavelengths (theta).")
    rope_scaling: dict[str, Any] | None = Field(
        None,
        description=(
            "Context extension of rotary positions in Hugging Face's form: rope_type linear, ntk, yarn (arXiv 2309.00071) or llama3, "
            "factor, original_max_position_embeddings, low_freq_factor, high_freq_factor, beta_fast, beta_slow, attention_factor."
        ),
    )
    rope_scaling_layers: Literal["all", "full"] = Field(
        "all", description="Layers whose rotary positions rope_scaling changes; full are those without a sliding window."
    )
    rotary_save_freqs_buffer: bool = Field(False, description="Keep the rotary frequencies in checkpoints.")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability of attention weights.")
