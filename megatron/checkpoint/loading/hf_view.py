# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder seen as one of our models: its keys, its weights, what of a configuration differs from it. Knows no ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron.checkpoint.formats.hf_files import CONFIG, read_config, read_state
from megatron.checkpoint.formats.torch_file import LazyState
from megatron.checkpoint.mapping.config_rows import Fixed
from megatron.checkpoint.mapping.families.registry import FAMILIES, family_of, neox_keys
from megatron.checkpoint.mapping.rows import Family, to_canonical
from megatron.errors import ConfigError
from megatron.model.spec import ModelSpec

FREE = frozenset({"seq_length", "hidden_dropout", "attention_dropout", "intermediate_size_convention"})
"""Keys that a training run may choose: the weights are the same model."""

ROWS = "padded_vocab_size"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, kw_only=True)
class HFModel:
    """A folder, its config.json, and the family whose rows read it."""

    directory: Path
    config: Mapping[str, Any]
    family: Family

    @classmethod
    def open(cls, directory: Path) -> HFModel:
        """Raises CheckpointError for a folder without a config, ConfigError for an architecture that no family reads."""
        config = read_config(directory)
        try:
            return cls(directory=directory, config=config, family=family_of(config))
        except ConfigError as error:
            known = ", ".join(family.hf for family in FAMILIES)
            raise ConfigError(error.what, where=str(directory / CONFIG), fix=f"these can be read: {known}") from error

    @property
    def keys(self) -> dict[str, Any]:
        """Our flat keys for it. Raises ConfigError for what our model cannot be."""
        return neox_keys(self.family, self.config)

    @property
    def mlp_width(self) -> int | None:
        """Columns of the MLP's second matrix; None where the config leaves it to its default."""
        width = self.keys.get("intermediate_size")
        return None if width is None else int(width)

    def facts(self) -> dict[str, Any]:
        """For a checkpoint to keep, so that an export is of the same kind: architecture, vocabulary, ids of special tokens."""
        ids = {name: self.config[name] for name in TOKEN_IDS if name in self.config}
        return {"architecture": self.family.hf, "vocab_size": self.keys[ROWS], "token_ids": ids}

    def weights(self, spec: ModelSpec, *, empty: bool = False) -> LazyState:
        """All weights under our names, whole, made on access. Raises CheckpointError where files or names are missing.

        empty: shapes alone, as tensors without numbers
        """
        return to_canonical(self.family, read_state(self.directory, empty=empty), spec)

    def require_same(self, keys: Mapping[str, Any], spec: ModelSpec) -> None:
        """Raise ConfigError, naming every difference, unless the configuration describes this model.

        keys: the run's flat keys, resolved; spec: the model they describe
        """
        lines = differences(self.family, self.config, keys, spec)
        if lines:
            raise ConfigError(
                f"the configuration does not describe the model in {self.directory}:\n" + "\n".join(f"    {line}" for line in lines),
                where=str(self.directory / CONFIG),
                fix=f"change these keys, or take all of the model's: python tools/ckpts/hf_config.py {self.directory}",
            )


def differences(family: Family, config: Mapping[str, Any], keys: Mapping[str, Any], spec: ModelSpec) -> list[str]:
    """What our configuration says otherwise than a Hugging Face config, one line each.

    Both are brought to the family's own form of our keys, so that two ways of writing the same thing are no difference.
    """
    lines: list[str] = []
    fields: dict[str, Any] = {}
    rows = [row for row in family.config if getattr(row, "neox", None) not in FREE]
    refused = []
    for row in rows:
        try:
            fields.update(row.to_hf(keys, spec))
        except ConfigError as error:
            refused.append(row)
            if isinstance(row, Fixed):
                lines.append(_line(row.neox, keys.get(row.neox), row.value))
            else:
                lines.append(f"{error.where}: {error.what}; {error.fix}")
    rows = [row for row in rows if row not in refused]
    ours, theirs = _complete(_merged(rows, fields)), _complete(_merged(rows, config))
    ours[ROWS] = spec.vocab_size
    free = FREE | _positions_free(spec)
    for key in dict.fromkeys((*theirs, *ours)):
        if key in free or (key == ROWS and ours[key] >= theirs.get(key, 0)):
            continue
        here, there = ours.get(key), theirs.get(key)
        if here != there:
            lines.append(_line(key, here, there))
    return lines


def _line(key: str, here: Any, there: Any) -> str:
    return f"{key}: {_shown(here)} here, {_shown(there)} in the model; set {key}: {'at least ' if key == ROWS else ''}{_shown(there)}"


def _merged(rows: list[Any], config: Mapping[str, Any]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for row in rows:
        keys.update(row.to_neox(config))
    return keys


def _complete(keys: dict[str, Any]) -> dict[str, Any]:
    """Keys that follow from others where they are absent."""
    whole = dict(keys)
    if whole.get("num_kv_heads") is None and "num_attention_heads" in whole:
        whole["num_kv_heads"] = whole["num_attention_heads"]
    if whole.get("intermediate_size") is None and "hidden_size" in whole:
        whole["intermediate_size"] = 4 * whole["hidden_size"]
    return whole


def _positions_free(spec: ModelSpec) -> frozenset[str]:
    """Without a table of positions, their limit is no part of the weights."""
    return frozenset() if spec.embedding.max_positions else frozenset({"max_position_embeddings"})


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def ready_yaml(model: HFModel, load: str) -> str:
    """Text of a configuration file that describes a model and starts from it."""
    keys: dict[str, Any] = {"load": load}
    if (model.directory / "tokenizer.json").is_file():
        keys |= {"tokenizer_type": "HFTokenizer", "vocab_file": str(model.directory)}
    stored = str(model.config.get("dtype") or model.config.get("torch_dtype") or "float32").removeprefix("torch.")
    keys |= {"precision": PRECISIONS.get(stored, "fp32"), **model.keys}
    title = f"# {model.family.hf}: what its config.json says, in the keys of this project.\n"
    return title + yaml.safe_dump(keys, sort_keys=False, width=120)


PRECISIONS = {"bfloat16": "bfloat16", "float16": "fp16", "float32": "fp32"}
"""dtype of a Hugging Face config -> our `precision`."""
