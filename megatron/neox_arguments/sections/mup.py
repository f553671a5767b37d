# SPDX-License-Identifier: Apache-2.0
"""Keys of the maximal update parametrisation. Knows nothing of the model it scales."""

from __future__ import annotations

from pydantic import Field

from .base import NO_EFFECT, Section, Whole


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
