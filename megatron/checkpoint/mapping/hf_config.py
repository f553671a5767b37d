# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory <-> our model and our keys, through a family's rows. Knows no ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from megatron.checkpoint.formats.hf_files import read_config, read_state, write_model
from megatron.checkpoint.formats.state import load_canonical
from megatron.checkpoint.mapping.families.registry import family_of
from megatron.checkpoint.mapping.rows import Family, from_canonical, to_canonical
from megatron.model.spec import ModelSpec


def neox_keys(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Our flat keys for the model that a Hugging Face config describes. Raises ConfigError for what our model cannot be."""
    keys: dict[str, Any] = {}
    for row in family.config:
        keys.update(row.to_neox(config))
    return keys


def hf_config(family: Family, keys: Mapping[str, Any], spec: ModelSpec, *, vocab_size: int | None = None) -> dict[str, Any]:
    """The Hugging Face config of our model.

    keys:       our flat keys, resolved; spec: the model they describe
    vocab_size: rows kept of the vocabulary; None = the padded size
    Raises ConfigError, naming the key, for what the family cannot express.
    """
    config: dict[str, Any] = {"model_type": family.model_type}
    for row in family.config:
        config.update(row.to_hf(keys, spec))
    config["vocab_size"] = spec.vocab_size if vocab_size is None else vocab_size
    return config


def load_hf(directory: Path, model: nn.Module, spec: ModelSpec) -> None:
    """Copy the weights of a Hugging Face directory into a `Transformer` of one tensor rank. Raises CheckpointError."""
    family = family_of(read_config(directory))
    load_canonical(model, to_canonical(family, read_state(directory), spec))


def save_hf(
    directory: Path, family: Family, state: Mapping[str, Tensor], keys: Mapping[str, Any], spec: ModelSpec, *, vocab_size: int | None = None
) -> None:
    """Write a canonical state as a Hugging Face directory. The config is checked before any tensor is read."""
    config = hf_config(family, keys, spec, vocab_size=vocab_size)
    write_model(directory, from_canonical(family, state, spec, vocab_size=vocab_size), config)
