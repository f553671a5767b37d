# SPDX-License-Identifier: Apache-2.0
"""muP: a model description whose activations and updates keep their size at any width."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron.model.spec import BlockSpec, ModelSpec


@dataclass(frozen=True, kw_only=True)
class Mup:
    """Maximal update parametrisation (Yang et al., arXiv 2203.03466, table 8).

    width_mult:     hidden_size over the base width, at which the hyper-parameters were found
    init_scale:     factor on the spread of all matrices
    attn_temp, output_temp: temperatures of attention scores and of logits
    embedding_mult: factor on the embedding's output
    """

    width_mult: float
    init_scale: float = 1.0
    attn_temp: float = 1.0
    output_temp: float = 1.0
    embedding_mult: float = 1.0


def with_mup(spec: ModelSpec, mup: Mup) -> ModelSpec:
    """`spec` under muP; at the base width only the scale of attention differs.

    Table 8 and not table 3, which is the same training: its embedding and head are drawn with one spread and may be one matrix.
    Widths of heads and MLP are taken to grow with hidden_size; how learning rates follow is said in optim/groups.py.
    """
    return replace(
        spec,
        embedding=replace(spec.embedding, multiplier=spec.embedding.multiplier * mup.embedding_mult),
        blocks=tuple(_block(block, mup) for block in spec.blocks),
        head=replace(spec.head, multiplier=spec.head.multiplier / (mup.width_mult * mup.output_temp)),
        init=replace(spec.init, width_mult=mup.width_mult, scale=mup.init_scale),
    )


def _block(block: BlockSpec, mup: Mup) -> BlockSpec:
    """Scores are q k / d: once trained, q and k are correlated, and their product grows with d and not with its root (def. 4.1)."""
    attention = block.attention
    return replace(block, mixer=replace(attention, softmax_scale=1.0 / (attention.head_dim * mup.attn_temp)))
