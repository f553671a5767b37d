# SPDX-License-Identifier: Apache-2.0
"""Keys of the maximal update parametrisation. Knows nothing of the model it scales."""

from __future__ import annotations

from pydantic import Field

from .base import NO_EFFECT, Section, Whole


class MupKeys(Section):
    """Width-independent hyper-parameters (arXiv 2203.03466)."""

    use_mup: bool = Field(False, description="Scale initialisation, learning rates and outputs with width by the muP rules.")
    coord_check: bool = Field(False, description="Measure how activations grow with width, write the plot and stop.")
    save_base_shapes: bool = Field(False, description="Write the shapes of the base and delta models and stop.")
    base_shapes_file: str | None = Field(None, description="File with the muP base shapes; .<rank> is appended to it.")
    mup_init_scale: float = Field(1.0, gt=0, description="Factor on the standard deviation of muP-initialised weights.")
    mup_attn_temp: float = Field(1.0, gt=0, description="Temperature of attention logits under muP.", json_schema_extra=NO_EFFECT)
    mup_output_temp: float = Field(1.0, gt=0, description="Temperature of the output logits under muP.", json_schema_extra=NO_EFFECT)
    mup_embedding_mult: float = Field(1.0, gt=0, description="Factor on the embedding's output under muP.")
    mup_rp_embedding_mult: float = Field(1.0, gt=0, description="Factor on position embeddings, with or without muP.")
    mup_width_scale: Whole = Field(2, ge=2, description="How many times wider the delta model is than the base model.")
