# SPDX-License-Identifier: Apache-2.0
"""Parameters and floating-point operations of a model, by arithmetic. Builds nothing and measures nothing."""

from __future__ import annotations

from dataclasses import replace

from megatron.model.spec import AttentionSpec, BlockSpec, EmbeddingSpec, MLPSpec, ModelSpec, NormKind, NormSpec, Positions, Residual


def parameter_count(spec: ModelSpec) -> int:
    """Trainable parameters of the whole model; a tied head counts once."""
    count = embedding_parameters(spec.embedding) + sum(map(block_parameters, spec.blocks)) + norm_parameters(spec.final_norm)
    shared = spec.blocks[0].attention if spec.blocks else None
    if shared is not None and shared.rpe is not None:
        count += shared.rpe.num_buckets * shared.num_heads
    return count if spec.tied else count + spec.head.vocab_size * spec.head.hidden_size


def embedding_parameters(spec: EmbeddingSpec) -> int:
    """Token table and, where learned, the position table."""
    rows = spec.vocab_size + (spec.max_positions + spec.position_offset if spec.positions is Positions.LEARNED else 0)
    return rows * spec.hidden_size


def norm_parameters(spec: NormSpec) -> int:
    """Scale and bias of one norm."""
    if spec.kind is NormKind.NON_PARAMETRIC:
        return 0
    if spec.kind is NormKind.SCALENORM:
        return 1
    return spec.size * (2 if spec.kind is NormKind.LAYERNORM and spec.bias else 1)


def block_parameters(spec: BlockSpec) -> int:
    """One block without the relative position table, which all blocks share."""
    norms = 1 if spec.residual is Residual.PARALLEL_TIED else 2
    return norms * norm_parameters(spec.norm) + attention_parameters(spec.attention) + mlp_parameters(spec.mlp)


def attention_parameters(spec: AttentionSpec) -> int:
    """Projections and norms of queries and keys."""
    inner, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    count = attention_matrix(spec)
    count += inner + 2 * kv if spec.bias else 0
    count += spec.hidden_size if spec.output_bias else 0
    if spec.qk_norm is not None:
        sizes = (spec.head_dim,) * 2 if spec.norm_each_head else (inner, kv)
        count += sum(norm_parameters(replace(spec.qk_norm, size=size)) for size in (sizes if spec.separate_qk_norms else (inner,)))
    return count


def attention_matrix(spec: AttentionSpec) -> int:
    """Elements of query_key_value and dense."""
    inner, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return spec.hidden_size * (inner + 2 * kv) + inner * spec.hidden_size


def mlp_parameters(spec: MLPSpec) -> int:
    """Both projections."""
    rows = 2 * spec.width if spec.gated else spec.width
    return mlp_matrix(spec) + (rows + spec.hidden_size if spec.bias else 0)


def mlp_matrix(spec: MLPSpec) -> int:
    """Elements of linear1 and linear2."""
    return spec.hidden_size * spec.width * (3 if spec.gated else 2)


def reported_flops_per_step(spec: ModelSpec, *, batch: int, recompute: bool) -> float:
    """The number behind the progress line's `approx flops`: FORMAT, NeoX's formula, over the whole global batch of `batch` rows.

    24 c B S L h^2 (1 + S / 6h + V / 16Lh) with c = 4 where activations are recomputed, else 3 (Narayanan et al., arXiv 2104.04473,
    sec. 5.1). It knows no grouped heads, gated widths, windows or causal halving: `matmul_flops_per_token` does.
    """
    s, h, v, layers = spec.seq_length, spec.hidden_size, spec.vocab_size, spec.num_layers
    passes = 4 if recompute else 3
    return 24.0 * passes * batch * s * layers * h**2 * (1.0 + s / (6.0 * h) + v / (16.0 * layers * h))


def matmul_flops_per_token(spec: ModelSpec, *, seq_length: int | None = None, recompute: bool = False) -> float:
    """Floating-point operations that training on one token needs in matrix products, forward and backward.

    Counts grouped heads, gated widths, the causal half of attention and its windows. recompute: with a second forward of the blocks.
    """
    length = spec.seq_length if seq_length is None else seq_length
    blocks = 0.0
    for block in spec.blocks:
        attention = block.attention
        scores = 2.0 * attention.num_heads * attention.head_dim * mean_visible(length, attention.window)  # q k^T and p v
        blocks += 2.0 * (attention_matrix(attention) + mlp_matrix(block.mlp) + scores)
    head = 2.0 * spec.head.hidden_size * spec.head.vocab_size
    return (4.0 if recompute else 3.0) * blocks + 3.0 * head


def mean_visible(length: int, window: int | None) -> float:
    """How many tokens a token of a row of `length` sees on average, itself included; `window` are those behind it."""
    if window is None or window >= length - 1:
        return (length + 1) / 2.0
    full = window + 1
    return (full * (full + 1) / 2.0 + (length - full) * full) / length
