# SPDX-License-Identifier: Apache-2.0
"""Keys for the model's shape: sizes, norms, MLP, residual topology, initialisation. Attention has its own file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .base import NO_EFFECT, Section, Whole
from .mixers import MixerKeys
from .moe import MoeKeys
from .mup import MupKeys
from .transformer_engine import TransformerEngineKeys

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
