# SPDX-License-Identifier: Apache-2.0
"""A finished step's folder -> a Hugging Face folder, a shard in memory at a time. Knows not when, and no ranks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.convert import save_hf
from megatron.checkpoint.durable import sync_folder
from megatron.checkpoint.families.registry import FAMILIES
from megatron.checkpoint.hf_store import CONFIG, read_json, write_json
from megatron.checkpoint.mapping import Family, from_canonical
from megatron.checkpoint.publishing import PARTIAL, publish
from megatron.checkpoint.state import LazyState
from megatron.checkpoint.whole import join_shards, read_shards, shapes_of
from megatron.errors import ConfigError, NeoXError
from megatron.model.spec import ModelSpec

SHARD_BYTES = 10**9
TOKENIZER = "tokenizer.json"
BESIDE_TOKENIZER = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True, kw_only=True)
class Export:
    """How the checkpoints of one run become Hugging Face folders.

    family: what the model is there
    keys:   our flat keys, resolved; spec: the model they describe
    dtype:  of the tensors written
    rows:   kept of the vocabulary; None = all, those that fill it up too
    fields: of config.json beyond the family's (ids of special tokens)
    tokenizer: a tokenizer.json, which goes along with what belongs to it
    """

    family: Family
    keys: Mapping[str, Any]
    spec: ModelSpec
    dtype: torch.dtype
    rows: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None

    def write(self, step: Path, out: Path) -> None:
        """Write the weights of the folder `step` as `out`, which gets its name when it is whole and on disk.

        Raises NeoXError or OSError; then `out` is as it was.
        """
        aside = out.with_name(f"{out.name}.{PARTIAL}")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            weights = join_shards(read_shards(step), self.spec)
            state = LazyState({name: partial(_cast, weights, name, self.dtype) for name in weights})
            save_hf(aside, self.family, state, self.keys, self.spec, vocab_size=self.rows, shard_bytes=SHARD_BYTES)
            described = {"torch_dtype": str(self.dtype).removeprefix("torch."), **self.fields}
            write_json(aside / CONFIG, {**read_json(aside / CONFIG), **described})
            self._add_tokenizer(aside)
            _settle(aside)
            publish(aside, out)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def _add_tokenizer(self, folder: Path) -> None:
        if self.tokenizer is None:
            return
        shutil.copyfile(self.tokenizer, folder / TOKENIZER)
        if self.tokenizer.name == TOKENIZER:
            for name in BESIDE_TOKENIZER:
                if (self.tokenizer.parent / name).is_file():
                    shutil.copyfile(self.tokenizer.parent / name, folder / name)
        if not (folder / "tokenizer_config.json").is_file():
            write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def _settle(folder: Path) -> None:
    """All on disk, and readable to whom config.json is: safetensors writes files for their owner alone."""
    mode = (folder / CONFIG).stat().st_mode & 0o777
    for path in sorted(folder.iterdir()):
        path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def _cast(weights: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    return weights[name].to(dtype)


def tokenizer_file(kind: str, vocab_file: str | None) -> Path | None:
    """The tokenizer.json that `tokenizer_type` and `vocab_file` name; None for another kind of tokenizer."""
    if kind != "HFTokenizer" or not vocab_file:
        return None
    given = Path(vocab_file).expanduser()
    return given / TOKENIZER if given.is_dir() else given


def family_for(keys: Mapping[str, Any], spec: ModelSpec, preferred: str | None = None) -> Family:
    """The first architecture that can express a model. preferred: the class name of the one to try first

    Raises ConfigError, naming the keys that the nearest one cannot express.
    """
    families = sorted(FAMILIES, key=lambda family: family.hf != preferred)
    refusals = [(family, refused(family, keys, spec)) for family in families]
    for family, errors in refusals:
        if not errors:
            return family
    nearest, errors = min(refusals, key=lambda one: len(one[1]))
    lines = [f"    {error.what}" for error in errors]
    raise ConfigError(
        f"save_hf: no Hugging Face architecture known here can be this model; {nearest.hf} comes nearest, but:\n" + "\n".join(lines),
        where=", ".join(dict.fromkeys(error.where for error in errors if error.where)) or "save_hf",
        mend="change these keys, or leave out save_hf",
    )


def refused(family: Family, keys: Mapping[str, Any], spec: ModelSpec) -> Sequence[NeoXError]:
    """Why a family cannot express a model, field by field, else tensor by tensor; nothing where it can."""
    errors: list[NeoXError] = []
    for row in family.config:
        try:
            row.to_hf(keys, spec)
        except ConfigError as error:
            errors.append(error)
    if errors:
        return errors
    try:
        from_canonical(family, dict.fromkeys(shapes_of(spec), torch.empty(0)), spec)
    except NeoXError as error:
        return [error]
    return []
