# SPDX-License-Identifier: Apache-2.0
"""Weights of another naming, or of another layout -> a step's folder for any number of tensor ranks and stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.conversion.external_weights import Foreign
from megatron.checkpoint.conversion.folder import check_free, written_aside
from megatron.checkpoint.conversion.model import Described, Finish, NeoXChoice
from megatron.checkpoint.conversion.step_writer import StepWriter
from megatron.checkpoint.conversion.tensor_manifest import ByteProgress, Noted, Table, write_record
from megatron.checkpoint.conversion.weights import Whole, check_files
from megatron.checkpoint.mapping.rows import Bound, bound_rows, to_canonical, usual_names
from megatron.checkpoint.steps.step_dirs import step_tag, write_latest
from megatron.errors import CheckpointError
from megatron.log import get_logger

log = get_logger(__name__)


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
