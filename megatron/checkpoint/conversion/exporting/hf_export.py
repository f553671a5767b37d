# SPDX-License-Identifier: Apache-2.0
"""A finished step's folder -> a Hugging Face folder, a tensor in memory at a time. Knows not when, and no ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.conversion.folder import written_aside
from megatron.checkpoint.conversion.model import Described
from megatron.checkpoint.conversion.safetensors_file import write_shards
from megatron.checkpoint.conversion.tensor_manifest import ByteProgress, Table, dtype_name
from megatron.checkpoint.conversion.to_hf import planned, unpacked
from megatron.checkpoint.conversion.tokenizer_files import save_tokenizer, write_generation_config
from megatron.checkpoint.conversion.weights import Whole
from megatron.checkpoint.formats.hf_files import CONFIG, SHARD_BYTES, write_json
from megatron.checkpoint.loading.merge_tp import shapes_of
from megatron.checkpoint.mapping.families.registry import FAMILIES
from megatron.checkpoint.mapping.hf_config import hf_config
from megatron.checkpoint.mapping.rows import Family, bound_rows, from_canonical
from megatron.errors import ConfigError, NeoXError
from megatron.model.spec import ModelSpec

TOKENIZER = "tokenizer.json"


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
        model = Described(self.keys, self.spec)
        config = hf_config(self.family, self.keys, self.spec, vocab_size=self.rows)
        config |= {"torch_dtype": dtype_name(self.dtype), **self.fields}
        weights = Whole(step, model)
        bound = list(bound_rows(self.family, self.spec, config["vocab_size"]))
        plan = planned(bound, model, weights.dtypes(), self.dtype)
        with written_aside(out, overwrite=True) as aside:
            table = Table(ByteProgress(f"exporting {step.name}", sum(one.bytes for one in plan)))
            write_shards(aside, plan, unpacked(bound, weights), table.add, limit=SHARD_BYTES)
            table.progress.close()
            if self.tokenizer is not None:
                save_tokenizer(self.tokenizer, aside)
            write_json(aside / CONFIG, config)
            write_generation_config(aside, config)


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
    if keys.get("train_impl") == "rm":
        fix = "leave out save_hf, and run tools/ckpts/convert_neox_to_hf.py with --pad-token-id"
        raise ConfigError("save_hf does not write reward models", where="save_hf", fix=fix)
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
        fix="change these keys, or leave out save_hf",
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
