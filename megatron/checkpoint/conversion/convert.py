# SPDX-License-Identifier: Apache-2.0
"""A step's folder as a Hugging Face directory and back, a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.conversion.model import Described, Finish, HFChoice, NeoXChoice
from megatron.checkpoint.conversion.output_folder import ByteProgress, Noted, Table, check_free, dtype_name, write_record, written_aside
from megatron.checkpoint.conversion.reward import scoring
from megatron.checkpoint.conversion.step_writer import StepWriter
from megatron.checkpoint.conversion.weights import Foreign, Whole, ahead, check_files
from megatron.checkpoint.formats.hf_files import CONFIG, Planned, write_json, write_shards
from megatron.checkpoint.mapping.families import FAMILIES, family_named, hf_config
from megatron.checkpoint.mapping.rows import Bound, Family, bound_rows, from_canonical, to_canonical, usual_names
from megatron.checkpoint.steps.step_dirs import step_tag, write_latest
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


def convert_to_neox(source: Foreign, out: Path, model: Described, choice: NeoXChoice, *, finish: Sequence[Finish] = ()) -> Path:
    """Write the weights of a foreign directory as a checkpoint in `out`; returns the step's folder.

    Nothing is left at `out` when anything fails. Raises CheckpointError for files that are damaged, missing or of another model.
    """
    check_free(out, overwrite=choice.overwrite)
    table = Table(ByteProgress("converting", source.total_bytes()))
    ours = to_canonical(source.family, Noted(source.tensors, table), model.spec)
    bound = list(bound_rows(source.family, model.spec, source.vocab_size))
    theirs = usual_names(source.family, source.tensors, {name for row in bound for name in row.theirs})
    check_shapes(source, bound, model, theirs)
    # Where looking is not cheap, the first tensor's dtype stands for all.
    common = None if source.cheap else next(iter(source.tensors.values())).dtype
    dtypes = {row.ours: common or theirs[row.theirs[0]].dtype for row in bound}
    facts = {"direction": "hf -> neox", "source": str(source.path), "architecture": source.family.hf, "source_config": source.config}
    return _write(out, ours, dtypes, model, choice, {**facts, "vocab_size": source.vocab_size}, table, finish)


def rewrite_neox(step: Path, out: Path, model: Described, choice: NeoXChoice, *, finish: Sequence[Finish] = ()) -> Path:
    """Write the weights of the folder `step`, in whatever names NeoX gave them, for another layout in `out`; returns the new folder."""
    check_free(out, overwrite=choice.overwrite)
    check_files(step)
    weights = Whole(step, model)
    dtypes = weights.dtypes()
    table = Table(ByteProgress("rewriting", sum(dtypes[name].itemsize * torch.Size(shape).numel() for name, shape in model.shapes.items())))
    facts = {"direction": "neox -> neox", "source": str(step)}
    return _write(out, Noted(weights.state(), table), dtypes, model, choice, facts, table, finish)


def _write(  # noqa: PLR0913
    out: Path,
    ours: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    model: Described,
    choice: NeoXChoice,
    facts: Mapping[str, Any],
    table: Table,
    finish: Sequence[Finish],
) -> Path:
    tag = step_tag(choice.iteration)
    log.info("%s -> %s: %d tensor ranks, %d stages", facts["source"], out, choice.tensor, choice.pipe)
    with written_aside(out, overwrite=choice.overwrite) as aside:
        step = aside / tag
        step.mkdir()
        writer = StepWriter(step, ours, dtypes, model, choice)
        writer.write()
        table.progress.close()
        layout = {"tensor": choice.tensor, "pipe": choice.pipe, "iteration": choice.iteration}
        write_record(aside, {**facts, **layout, "padded_vocab_size": model.spec.vocab_size}, table)
        for add in finish:
            add(aside)
        writer.write_manifest()
        write_latest(aside, tag)
    return out / tag


def check_shapes(source: Foreign, bound: Sequence[Bound], model: Described, stored: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError, naming the tensors, unless each has the shape that the configuration gives it."""
    if not source.cheap:
        return
    wrong = []
    for row in bound:
        parts = row.op.unpack([torch.empty(model.shapes[row.ours], device="meta")], row.place)
        for name, part in zip(row.theirs, parts, strict=True):
            found = tuple(stored[name].shape)
            if found != tuple(part.shape):
                wrong.append(f"{name}: {found} in the file, {tuple(part.shape)} by its configuration")
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        what = "weights and configuration differ. " + "; ".join(wrong[:6]) + more
        raise CheckpointError(what, where=str(source.path), fix="copy both from the same model")
