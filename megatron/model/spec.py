# SPDX-License-Identifier: Apache-2.0
"""What a model is: frozen numbers and choices; and how muP changes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from megatron.errors import ConfigError


class NormKind(str, Enum):
    """Normalisation families; values are the `norm` key's."""

    LAYERNORM = "layernorm"
    RMSNORM = "rmsnorm"
    NON_PARAMETRIC = "non_parametric_layernorm"
    SCALENORM = "scalenorm"


class Positions(str, Enum):
    """Positional encodings; values are the `pos_emb` key's."""

    LEARNED = "learned"
    SINUSOIDAL = "sinusoidal"
    ROTARY = "rotary"
    RPE = "rpe"
    ALIBI = "alibi"
    NONE = "none"


class Residual(str, Enum):
    """How a block adds its two sublayers to the stream."""

    SEQUENTIAL = "sequential"  # x += attn(ln1 x); x += mlp(ln2 x)
    PARALLEL = "parallel"  # x += attn(ln1 x) + mlp(ln2 x)     (gpt_j_residual)
    PARALLEL_TIED = "parallel_tied"  # x += attn(ln1 x) + mlp(ln1 x)     (gpt_j_tied)
    POST_SUBLAYER = "post_sublayer"  # x += ln1(attn x); x += ln2(mlp x) (norm_placement: olmo3)


class BackendName(str, Enum):
    """Attention back ends; values are the `attention_backend` key's."""

    AUTO = "auto"  # SDPA, or varlen / flash-attn where documents are isolated on CUDA
    EAGER = "eager"  # matmul, mask, softmax: the reference the others are tested against
    SDPA = "sdpa"
    VARLEN = "varlen"  # torch.nn.attention.varlen (CUDA)
    FLASH_ATTN = "flash_attn"  # the flash-attn package (CUDA)


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """A normalisation over the last `size` features."""

    kind: NormKind
    size: int
    eps: float
    bias: bool = True  # LayerNorm only

    @property
    def parameter_count(self) -> int:
        """Elements of scale and bias."""
        if self.kind is NormKind.NON_PARAMETRIC:
            return 0
        if self.kind is NormKind.SCALENORM:
            return 1
        return self.size * (2 if self.kind is NormKind.LAYERNORM and self.bias else 1)


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Context extension of rotary embeddings; names as in Hugging Face's `rope_scaling`.

    kind: linear (arXiv 2306.15595) | ntk | yarn (arXiv 2309.00071) | llama3
    """

    kind: str
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None = 0.1 ln(factor) + 1


@dataclass(frozen=True, kw_only=True)
class RotarySpec:
    """Rotary positions on the first `dim` features of each head (half-split convention)."""

    dim: int
    base: float = 10000.0
    scaling: RopeScaling | None = None
    save_freqs: bool = False  # FORMAT: keeps attention.rotary_emb.inv_freq in checkpoints


@dataclass(frozen=True, kw_only=True)
class RpeSpec:
    """T5 relative position bias (arXiv 1910.10683), causal."""

    num_buckets: int = 32
    max_distance: int = 128


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """One attention mixer. Sizes are global; a rank holds num_heads / tp of them."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool = True
    dense_bias: bool | None = None  # of the output projection; None = as bias
    rotary: RotarySpec | None = None
    rpe: RpeSpec | None = None
    alibi: bool = False
    window: int | None = None  # FORMAT: NeoX counts the tokens behind the current one: window + 1 are visible
    dropout: float = 0.0
    softmax_scale: float | None = None  # None = 1 / sqrt(head_dim)
    softmax_in_fp32: bool = True
    logit_divisor: float = 1.0  # apply_query_key_layer_scaling: numerics only, multiplied back inside the softmax
    qk_norm: NormSpec | None = None  # FORMAT: one norm with weights [heads, head_dim] for both q and k
    separate_qk_norms: bool = False  # q_norm over num_heads*head_dim, k_norm over num_kv_heads*head_dim
    norm_each_head: bool = False  # of separate norms: each head by itself, with one weight [head_dim] for all
    isolated: bool = True  # attention_over_documents; False = joined: segment_ids are never looked at
    flash: bool = False  # AUTO takes the flash-attn package where it can
    backend: BackendName = BackendName.AUTO

    @property
    def output_bias(self) -> bool:
        """Whether the output projection has a bias."""
        return self.bias if self.dense_bias is None else self.dense_bias


@dataclass(frozen=True, kw_only=True)
class MLPSpec:
    """Feed-forward sublayer. width is the input width of linear2; gated doubles linear1's rows."""

    hidden_size: int
    width: int
    activation: str
    bias: bool = True

    @property
    def gated(self) -> bool:
        """Whether the activation takes two halves: value * act(gate)."""
        return self.activation in GATED


GATED = ("geglu", "reglu", "swiglu", "bilinear", "glu")


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """One layer of the stack: what stands in its two slots, and how norms and residuals join them.

    mixer, ffn: specs whose classes are in the table of `model/slots.py`
    """

    mixer: Any
    ffn: Any
    norm: NormSpec
    residual: Residual = Residual.SEQUENTIAL
    hidden_dropout: float = 0.0

    @property
    def attention(self) -> AttentionSpec:
        """The mixer of a layer with attention. Raises ConfigError for another mixer."""
        if not isinstance(self.mixer, AttentionSpec):
            raise ConfigError(f"this is for layers with attention, not for {type(self.mixer).__name__}", fix="use a model with attention")
        return self.mixer

    @property
    def mlp(self) -> MLPSpec:
        """The feed-forward of a dense layer. Raises ConfigError for another one."""
        if not isinstance(self.ffn, MLPSpec):
            raise ConfigError(f"this is for layers with a dense MLP, not for {type(self.ffn).__name__}", fix="use a model with dense MLPs")
        return self.ffn


@dataclass(frozen=True, kw_only=True)
class EmbeddingSpec:
    """Token embedding and, where positions are added to it, their table."""

    vocab_size: int  # padded
    hidden_size: int
    positions: Positions = Positions.NONE  # LEARNED or SINUSOIDAL add to the embedding, others do not
    max_positions: int = 0
    position_offset: int = 0  # 2 for OPT
    dropout: float = 0.0
    multiplier: float = 1.0
    position_multiplier: float = 1.0


class HeadKind(str, Enum):
    """What the last layer gives for each position."""

    VOCABULARY = "vocabulary"  # logits of the next token
    VALUE = "value"  # one score (reward models)


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """The last layer. block_rows bounds how many rows of logits exist at once (0 = chosen by device and vocabulary)."""

    hidden_size: int
    vocab_size: int
    kind: HeadKind = HeadKind.VOCABULARY
    block_rows: int = 0
    multiplier: float = 1.0  # on the logits (muP)

    @property
    def parameter_count(self) -> int:
        """Elements of the head's matrix."""
        return self.hidden_size * (self.vocab_size if self.kind is HeadKind.VOCABULARY else 1)


@dataclass(frozen=True, kw_only=True)
class InitSpec:
    """How weights start. `method` for inputs of sublayers, `output_method` for attention.dense and mlp.linear2.

    width_mult: muP: hidden_size over the base width, at which the methods are meant; 1 = no muP
    scale:      further factor on every weight that is drawn
    """

    method: str = "normal"
    output_method: str = "scaled_normal"
    std: float = 0.02
    width_mult: float = 1.0
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The whole model."""

    hidden_size: int
    seq_length: int
    embedding: EmbeddingSpec
    blocks: tuple[BlockSpec, ...]
    final_norm: NormSpec
    head: HeadSpec
    tied: bool = False
    init: InitSpec = InitSpec()

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def vocab_size(self) -> int:
        """Padded vocabulary size."""
        return self.embedding.vocab_size


def with_mup(
    spec: ModelSpec,
    *,
    width_mult: float,
    init_scale: float = 1.0,
    attn_temp: float = 1.0,
    output_temp: float = 1.0,
    embedding_mult: float = 1.0,
) -> ModelSpec:
    """`spec` under muP, maximal update parametrisation (Yang et al., arXiv 2203.03466, table 8).

    At the base width only the scale of attention differs.

    width_mult:     hidden_size over the base width, at which the hyper-parameters were found
    init_scale:     factor on the spread of all matrices
    attn_temp, output_temp: temperatures of attention scores and of logits
    embedding_mult: factor on the embedding's output

    Table 8 and not table 3, which is the same training: its embedding and head are drawn with one spread and may be one matrix.
    Widths of heads and MLP are taken to grow with hidden_size; how learning rates follow is said in optim/groups.py.
    """

    def block(plain: BlockSpec) -> BlockSpec:
        # Scores are q k / d: once trained, q and k are correlated, and their product grows with d and not with its root (def. 4.1).
        attention = plain.attention
        return replace(plain, mixer=replace(attention, softmax_scale=1.0 / (attention.head_dim * attn_temp)))

    return replace(
        spec,
        embedding=replace(spec.embedding, multiplier=spec.embedding.multiplier * embedding_mult),
        blocks=tuple(map(block, spec.blocks)),
        head=replace(spec.head, multiplier=spec.head.multiplier / (width_mult * output_temp)),
        init=replace(spec.init, width_mult=width_mult, scale=init_scale),
    )
