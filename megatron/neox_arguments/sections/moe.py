# SPDX-License-Identifier: Apache-2.0
"""Keys of mixture-of-experts layers. Knows nothing of the experts' own shape."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import NO_EFFECT, Section, Whole


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
