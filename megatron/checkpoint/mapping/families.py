# SPDX-License-Identifier: Apache-2.0
"""All families of Hugging Face models, and a configuration of either side as the other's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.mapping.config_rows import ConfigRow
from megatron.checkpoint.mapping.dialects import DIALECTS
from megatron.checkpoint.mapping.gpt import GPT2, GPT_NEOX
from megatron.checkpoint.mapping.llama import LLAMA, MISTRAL, OLMO2, OLMO3, QWEN2, QWEN3
from megatron.checkpoint.mapping.meta_llama import META_LLAMA
from megatron.checkpoint.mapping.rows import Family
from megatron.errors import ConfigError
from megatron.model.spec import ModelSpec

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


def neox_keys(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Our flat keys for the model that a Hugging Face config describes. Raises ConfigError for what our model cannot be."""
    return {key: value for row in family.config for key, value in row.to_neox(config).items()}


Refusals = list[tuple[ConfigRow, ConfigError]]


def expressed(family: Family, keys: Mapping[str, Any], spec: ModelSpec) -> tuple[dict[str, Any], Refusals]:
    """The fields of our model in the Hugging Face form, and the rows that cannot express it, each with the reason.

    keys: our flat keys, resolved; spec: the model they describe
    """
    fields: dict[str, Any] = {}
    refusals: Refusals = []
    for row in family.config:
        try:
            fields.update(row.to_hf(keys, spec))
        except ConfigError as error:
            refusals.append((row, error))
    return fields, refusals


def hf_config(family: Family, keys: Mapping[str, Any], spec: ModelSpec, *, vocab_size: int | None = None) -> dict[str, Any]:
    """The Hugging Face config of our model.

    keys:       our flat keys, resolved; spec: the model they describe
    vocab_size: rows kept of the vocabulary; None = the padded size
    Raises ConfigError, naming the key, for what the family cannot express.
    """
    fields, refusals = expressed(family, keys, spec)
    for _, error in refusals:
        raise error
    return {"model_type": family.model_type, **fields, "vocab_size": spec.vocab_size if vocab_size is None else vocab_size}
