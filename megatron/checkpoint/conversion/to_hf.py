# SPDX-License-Identifier: Apache-2.0
"""A step's folder -> a Hugging Face directory, one tensor of ours in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.conversion.folder import check_free, written_aside
from megatron.checkpoint.conversion.model import Described, Finish, HFChoice
from megatron.checkpoint.conversion.prefetch import ahead
from megatron.checkpoint.conversion.reward import scoring
from megatron.checkpoint.conversion.safetensors_file import Planned, write_shards
from megatron.checkpoint.conversion.tensor_manifest import ByteProgress, Table, dtype_name, write_record
from megatron.checkpoint.conversion.weights import Whole, check_files
from megatron.checkpoint.formats.hf_files import CONFIG, write_json
from megatron.checkpoint.mapping.families.registry import FAMILIES, family_named
from megatron.checkpoint.mapping.hf_config import hf_config
from megatron.checkpoint.mapping.rows import Bound, Family, bound_rows, from_canonical
from megatron.errors import CheckpointError, ConfigError
from megatron.log import get_logger

log = get_logger(__name__)


def convert_to_hf(step: Path, out: Path, model: Described, choice: HFChoice, *, finish: Sequence[Finish] = ()) -> Family:
    """Write the weights of the folder `step` as the Hugging Face directory `out`; returns its architecture.

    Nothing is left at `out` when anything fails. Raises ConfigError for what no architecture can express, before a tensor is read;
    CheckpointError for a checkpoint that is damaged or of another model.
    """
    check_free(out, overwrite=choice.overwrite)
    spec, rows = model.spec, choice.vocab_size
    if rows is not None and not 0 < rows <= spec.vocab_size:
        raise ConfigError(f"{rows} rows of {spec.vocab_size} cannot be kept", where="vocab_size", fix=f"give 1 to {spec.vocab_size}")
    families = candidates(model, choice)  # what cannot be expressed is told first
    check_files(step)
    weights = Whole(step, model)
    family = fitting(families, model, weights.names)
    config = hf_config(family, model.keys, spec, vocab_size=rows)
    bound = list(bound_rows(family, spec, config["vocab_size"]))
    plan = planned(bound, model, weights.dtypes(), choice.precision.dtype)
    config |= {"torch_dtype": dtype_name(plan[0].dtype), **choice.fields}
    log.info("%s -> %s: %s, %d tensors, %s", step, out, family.hf, len(plan), config["torch_dtype"])
    with written_aside(out, overwrite=choice.overwrite) as aside:
        table = Table(ByteProgress("converting", sum(one.bytes for one in plan)))
        write_shards(aside, plan, unpacked(bound, weights), table.add, limit=choice.shard_bytes)
        table.progress.close()
        write_json(aside / CONFIG, config)
        write_record(aside, _facts(step, family, config), table)
        for add in finish:
            add(aside)
    return family


def candidates(model: Described, choice: HFChoice) -> list[Family]:
    """The architecture asked for, or all whose fields can say what this model is.

    Raises ConfigError, naming keys, when there is none.
    """
    if choice.architecture is not None:
        family = _form(family_named(choice.architecture), model)
        hf_config(family, model.keys, model.spec)
        return [family]
    found, reasons = [], []
    for family in sorted(FAMILIES, key=lambda one: one.name != choice.preferred):
        try:
            form = _form(family, model)
            hf_config(form, model.keys, model.spec)
            found.append(form)
        except ConfigError as error:
            reasons.append(f"{family.name}: {error.what}")
    if not found:
        fix = "train a model that one of them has, or use its checkpoint here"
        raise ConfigError("no Hugging Face architecture can express this model. " + "; ".join(reasons), where="architecture", fix=fix)
    return found


def _form(family: Family, model: Described) -> Family:
    return scoring(family) if model.reward else family


def fitting(families: Sequence[Family], model: Described, names: Sequence[str]) -> Family:
    """The first architecture that has a place for every tensor. Raises CheckpointError, with the first one's reason, when none has."""
    reasons = []
    for family in families:
        try:
            from_canonical(family, dict.fromkeys(names, torch.empty(0)), model.spec)
            return family
        except CheckpointError as error:
            reasons.append(error)
    raise reasons[0]


def planned(bound: Sequence[Bound], model: Described, dtypes: Mapping[str, torch.dtype], dtype: torch.dtype | None) -> list[Planned]:
    """The tensors that the rows will give, in their order; the layouts run without numbers."""
    plan = []
    for row in bound:
        ours = torch.empty(model.shapes[row.ours], dtype=dtypes[row.ours], device="meta")
        parts = row.op.unpack([ours], row.place)
        plan += [Planned(name, tuple(part.shape), dtype or part.dtype) for name, part in zip(row.theirs, parts, strict=True)]
    return plan


def unpacked(bound: Sequence[Bound], weights: Whole) -> Iterator[tuple[str, Tensor]]:
    """The other side's tensors, each of ours read once."""
    for parts in ahead(zip(row.theirs, row.op.unpack([weights[row.ours]], row.place), strict=True) for row in bound):
        yield from parts


def _facts(step: Path, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"direction": "neox -> hf", "source": str(step), "architecture": family.hf, "vocab_size": config["vocab_size"]}
