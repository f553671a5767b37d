# SPDX-License-Identifier: Apache-2.0
"""Parameters and floating-point operations of a model, by arithmetic. What a slot has and does is asked of its class."""

from __future__ import annotations

from megatron.model.slots import all_slots, slots_of
from megatron.model.spec import BlockSpec, EmbeddingSpec, HeadKind, ModelSpec, Positions, Residual


def parameter_count(spec: ModelSpec) -> int:
    """Trainable parameters of the whole model; a tied head counts once."""
    shared = {kind: kind.shared_parameter_count(slot) for kind, slot in reversed(list(all_slots(spec)))}
    count: int = embedding_parameters(spec.embedding) + spec.final_norm.parameter_count
    count += sum(map(block_parameters, spec.blocks)) + sum(shared.values())
    return count if spec.tied and spec.head.kind is HeadKind.VOCABULARY else count + spec.head.parameter_count


def embedding_parameters(spec: EmbeddingSpec) -> int:
    """Token table and, where learned, the position table."""
    rows = spec.vocab_size + (spec.max_positions + spec.position_offset if spec.positions is Positions.LEARNED else 0)
    return rows * spec.hidden_size


def block_parameters(spec: BlockSpec) -> int:
    """One block without what all blocks share."""
    norms = 1 if spec.residual is Residual.PARALLEL_TIED else 2
    return norms * spec.norm.parameter_count + sum(kind.parameter_count(slot) for kind, slot in slots_of(spec))


def reported_flops_per_step(spec: ModelSpec, *, batch: int, recompute: bool) -> float:
    """The number behind the progress line's `approx flops`: FORMAT, NeoX's formula, over the whole global batch of `batch` rows.

    24 c B S L h^2 (1 + S / 6h + V / 16Lh) with c = 4 where activations are recomputed, else 3 (Narayanan et al., arXiv 2104.04473,
    sec. 5.1). It does not count grouped heads, gated widths, windows and causal halving; `matmul_flops_per_token` does.
    """
    s, h, v, layers = spec.seq_length, spec.hidden_size, spec.vocab_size, spec.num_layers
    passes = 4 if recompute else 3
    return 24.0 * passes * batch * s * layers * h**2 * (1.0 + s / (6.0 * h) + v / (16.0 * layers * h))


def matmul_flops_per_token(spec: ModelSpec, *, seq_length: int | None = None, recompute: bool = False) -> float:
    """Floating-point operations that training on one token needs in matrix products, forward and backward.

    Counts grouped heads, gated widths, the causal half of attention and its windows. recompute: with a second forward of the blocks.
    """
    length = spec.seq_length if seq_length is None else seq_length
    blocks = sum(kind.forward_flops(slot, length) for kind, slot in all_slots(spec))
    return (4.0 if recompute else 3.0) * blocks + 3.0 * 2.0 * spec.head.parameter_count
