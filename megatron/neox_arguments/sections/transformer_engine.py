# SPDX-License-Identifier: Apache-2.0
"""Keys of NVIDIA Transformer Engine. Knows nothing of the layers it would replace."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import Section, Whole


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
