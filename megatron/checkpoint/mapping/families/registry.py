# SPDX-License-Identifier: Apache-2.0
"""Architecture name -> Family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.mapping.families.dialects import DIALECTS
from megatron.checkpoint.mapping.families.gpt2 import GPT2
from megatron.checkpoint.mapping.families.gpt_neox import GPT_NEOX
from megatron.checkpoint.mapping.families.llama import LLAMA
from megatron.checkpoint.mapping.families.meta_llama import META_LLAMA
from megatron.checkpoint.mapping.families.mistral import MISTRAL
from megatron.checkpoint.mapping.families.olmo import OLMO2, OLMO3
from megatron.checkpoint.mapping.families.qwen import QWEN2, QWEN3
from megatron.checkpoint.mapping.rows import Family
from megatron.errors import ConfigError

FAMILIES: tuple[Family, ...] = (GPT_NEOX, GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, OLMO3)
"""Of Hugging Face."""


def family_named(name: str) -> Family:
    """By short name (`llama`), class name (`LlamaForCausalLM`) or model type. Raises ConfigError for an unknown one."""
    for family in (*FAMILIES, META_LLAMA, *DIALECTS):
        if name in (family.name, family.hf, family.model_type):
            return family
    raise ConfigError(f"unknown architecture '{name}'", where="architecture", fix=f"one of {', '.join(f.name for f in FAMILIES)}")


def family_of(config: Mapping[str, Any]) -> Family:
    """By the content of a Hugging Face config.json."""
    names = config.get("architectures") or [config.get("model_type", "")]
    return family_named(names[0])
