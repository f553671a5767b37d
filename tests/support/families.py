# SPDX-License-Identifier: Apache-2.0
"""A tiny model of each family of checkpoints, and the same model in other sizes. Knows no file."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from megatron.model.build_spec import build_spec
from megatron.model.spec import ModelSpec
from megatron.neox_arguments import NeoXArgs
from support.tiny import tiny

POST_NORMS = {"norm_placement": "olmo3", "use_qk_layernorm": True, "use_separate_qk_norms": True}
STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "neox": ("neox", {}),
    "gpt2": ("gpt2", {}),
    "llama": ("llama", {}),
    "mistral": ("llama", {}),
    "qwen2": ("llama", {"use_bias_in_attn_linear": True, "use_bias_in_attn_output": False}),
    "qwen3": ("llama", {"use_qk_layernorm": True, "use_separate_qk_norms": True, "qk_norm_each_head": True}),
    "olmo2": ("llama", POST_NORMS),
    "olmo3": ("llama", POST_NORMS),
}


def family_args(name: str, **overrides: Any) -> NeoXArgs:
    """Of the tiny model, with a vocabulary of 512."""
    style, keys = STYLES[name]
    return NeoXArgs.from_dict(tiny(style, **{"padded_vocab_size": 512, **keys, **overrides}))


@cache
def family_spec(name: str) -> ModelSpec:
    """The tiny model."""
    return build_spec(family_args(name))


def resized(
    spec: ModelSpec, *, heads: int, kv_heads: int, head_dim: int, width: int = 5, vocab_size: int = 7, tied: bool = False
) -> ModelSpec:
    """The same kind of model in other sizes, 6 features wide."""
    hidden = 6
    block = spec.blocks[0]
    attention = replace(block.attention, hidden_size=hidden, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, rotary=None)
    attention = attention if attention.qk_norm is None else replace(attention, qk_norm=replace(attention.qk_norm, size=head_dim))
    norm = replace(block.norm, size=hidden)
    block = replace(block, mixer=attention, ffn=replace(block.mlp, hidden_size=hidden, width=width), norm=norm)
    return replace(
        spec,
        hidden_size=hidden,
        embedding=replace(spec.embedding, hidden_size=hidden, vocab_size=vocab_size),
        head=replace(spec.head, hidden_size=hidden, vocab_size=vocab_size),
        blocks=(block, block),
        final_norm=norm,
        tied=tied,
    )
