# SPDX-License-Identifier: Apache-2.0
"""Keys of the layer types beside attention: Mamba, RWKV, gMLP. Knows no other part of the model."""

from __future__ import annotations

from pydantic import Field

from .base import Section, Whole


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
