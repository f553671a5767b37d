# SPDX-License-Identifier: Apache-2.0
"""Tiny model specifications, one knob at a time. Knows no configuration."""

from __future__ import annotations

from typing import Any

from megatron.model.spec import (
    AttentionSpec,
    BlockSpec,
    EmbeddingSpec,
    HeadSpec,
    InitSpec,
    MLPSpec,
    ModelSpec,
    NormKind,
    NormSpec,
    Positions,
    RotarySpec,
    RpeSpec,
)

HIDDEN, HEADS, VOCAB, LENGTH = 32, 4, 64, 24


def norm_spec(kind: NormKind = NormKind.LAYERNORM, **changes: Any) -> NormSpec:
    return NormSpec(**{"kind": kind, "size": HIDDEN, "eps": 1e-5, **changes})


def attention_spec(positions: Positions = Positions.ROTARY, **changes: Any) -> AttentionSpec:
    given: dict[str, Any] = {"hidden_size": HIDDEN, "num_heads": HEADS, "num_kv_heads": HEADS, "head_dim": HIDDEN // HEADS}
    given["rotary"] = RotarySpec(dim=4) if positions is Positions.ROTARY else None
    given["rpe"] = RpeSpec(num_buckets=8, max_distance=16) if positions is Positions.RPE else None
    given["alibi"] = positions is Positions.ALIBI
    return AttentionSpec(**{**given, **changes})


def model_spec(
    *,
    layers: int = 2,
    positions: Positions = Positions.ROTARY,
    tied: bool = False,
    embedding: dict[str, Any] | None = None,
    attention: dict[str, Any] | None = None,
    init: InitSpec | None = None,
    **block: Any,
) -> ModelSpec:
    """embedding, attention and block change fields of those specs; a block's norm is the final norm too."""
    given = {"norm": norm_spec(), "ffn": MLPSpec(hidden_size=HIDDEN, width=48, activation="gelu"), **block}
    added = positions in (Positions.LEARNED, Positions.SINUSOIDAL)
    opening = {"positions": positions if added else Positions.NONE, "max_positions": LENGTH if added else 0, **(embedding or {})}
    return ModelSpec(
        hidden_size=HIDDEN,
        seq_length=LENGTH,
        embedding=EmbeddingSpec(vocab_size=VOCAB, hidden_size=HIDDEN, **opening),
        blocks=(BlockSpec(mixer=attention_spec(positions, **(attention or {})), **given),) * layers,
        final_norm=given["norm"],
        head=HeadSpec(hidden_size=HIDDEN, vocab_size=VOCAB),
        tied=tied,
        init=init or InitSpec(std=0.2),
    )
