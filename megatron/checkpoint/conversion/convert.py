# SPDX-License-Identifier: Apache-2.0
"""A step's folder as a Hugging Face directory and back, a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.conversion.model import Described, Finish, OutputLayout, ToHF, scoring
from megatron.checkpoint.conversion.output_folder import ByteProgress, Table, check_free, dtype_name, write_record, written_aside
from megatron.checkpoint.conversion.weights import Foreign, Whole, ahead, check_files
from megatron.checkpoint.formats.hf_files import CONFIG, Planned, write_json, write_shards
from megatron.checkpoint.formats.neox_files import layer_name, model_file
from megatron.checkpoint.formats.torch_file import SEQUENTIAL, Later, streaming, summary
from megatron.checkpoint.mapping.families import FAMILIES, family_named, hf_config, of_rank
from megatron.checkpoint.mapping.rows import Bound, Family, bound_rows, from_canonical, to_canonical, usual_names
from megatron.checkpoint.steps.manifest import Manifest, files_in, write_manifest
from megatron.checkpoint.steps.step_dirs import step_tag, write_latest
from megatron.errors import CheckpointError, ConfigError
from megatron.log import get_logger
from megatron.mpu.sharding import Replicated, split
from megatron.provenance import code_version

log = get_logger(__name__)


def convert_to_hf(model: Described, request: ToHF, *, finish: Sequence[Finish] = ()) -> Family:
    """Write the weights of a step's folder, `source`, as the Hugging Face directory `out`; returns its architecture.

    Nothing is left at `out` when anything fails. Raises ConfigError for what no architecture can express, before a tensor is read;
    CheckpointError for a checkpoint that is damaged or of another model.
    """
    check_free(request.out, overwrite=request.overwrite)
    rows, most = request.vocab_size, model.spec.vocab_size
    if rows is not None and not 0 < rows <= most:
        raise ConfigError(f"{rows} rows of {most} cannot be kept", where="vocab_size", fix=f"give 1 to {most}")
    families = candidates(model, request)  # what cannot be expressed is told first
    check_files(request.source)
    weights = Whole(request.source, model)
    family = fitting(families, model, weights.names)
    write_hf(weights, model, family, request, finish=finish)
    return family


def write_hf(
    weights: Whole, model: Described, family: Family, request: ToHF, *, finish: Sequence[Finish], title: str | None = None
) -> None:
    """The directory itself. title: of a run's export, of which no record is written; None: of a conversion"""
    config = hf_config(family, model.keys, model.spec, vocab_size=request.vocab_size)
    bound = list(bound_rows(family, model.spec, config["vocab_size"]))
    plan = planned(bound, model, weights.dtypes(), request.precision.dtype)
    config |= {"torch_dtype": dtype_name(plan[0].dtype), **request.fields}
    if title is None:
        log.info("%s -> %s: %s, %d tensors, %s", request.source, request.out, family.hf, len(plan), config["torch_dtype"])
    with written_aside(request.out, overwrite=request.overwrite) as aside:
        table = Table(ByteProgress(title or "converting", sum(one.bytes for one in plan)))
        write_shards(aside, plan, unpacked(bound, weights), table.add, limit=request.shard_bytes)
        table.progress.close()
        write_json(aside / CONFIG, config)
        if title is None:
            facts = {"source": str(request.source), "architecture": family.hf, "vocab_size": config["vocab_size"]}
            write_record(aside, {"direction": "neox -> hf", **facts}, table)
        for add in finish:
            add(aside)


def candidates(model: Described, request: ToHF) -> list[Family]:
    """The architecture asked for, or all whose fields can say what this model is.

    Raises ConfigError, naming keys, when there is none.
    """
    asked = [] if request.architecture is None else [family_named(request.architecture)]
    found, reasons = [], []
    for family in asked or sorted(FAMILIES, key=lambda one: one.name != request.preferred):
        try:
            form = scoring(family) if model.reward else family
            hf_config(form, model.keys, model.spec)
            found.append(form)
        except ConfigError as error:
            if asked:
                raise
            reasons.append(f"{family.name}: {error.what}")
    if not found:
        fix = "train a model that one of them has, or use its checkpoint here"
        raise ConfigError("no Hugging Face architecture can express this model. " + "; ".join(reasons), where="architecture", fix=fix)
    return found


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


def convert_to_neox(source: Foreign, model: Described, request: OutputLayout, *, finish: Sequence[Finish] = ()) -> Path:
    """Write the weights of a foreign directory as a checkpoint in `out`; returns the step's folder.

    Nothing is left at `out` when anything fails. Raises CheckpointError for files that are damaged, missing or of another model.
    """
    check_free(request.out, overwrite=request.overwrite)
    table = Table(ByteProgress("converting", source.total_bytes()))
    ours = to_canonical(source.family, table.noting(source.tensors), model.spec)
    bound = list(bound_rows(source.family, model.spec, source.vocab_size))
    theirs = usual_names(source.family, source.tensors, {name for row in bound for name in row.theirs})
    check_shapes(source, bound, model, theirs)
    # Where looking is not cheap, the first tensor's dtype stands for all.
    common = None if source.cheap else next(iter(source.tensors.values())).dtype
    dtypes = {row.ours: common or theirs[row.theirs[0]].dtype for row in bound}
    facts = {"direction": "hf -> neox", "source": str(source.path), "architecture": source.family.hf, "source_config": source.config}
    return _write(StepWriter(ours, dtypes, model, request), {**facts, "vocab_size": source.vocab_size}, table, finish)


def rewrite_neox(model: Described, request: OutputLayout, *, finish: Sequence[Finish] = ()) -> Path:
    """Write a step's folder, `source`, in whatever names NeoX gave its weights, for another layout in `out`; returns the new folder."""
    check_free(request.out, overwrite=request.overwrite)
    check_files(request.source)
    weights = Whole(request.source, model)
    dtypes = weights.dtypes()
    table = Table(ByteProgress("rewriting", sum(dtypes[name].itemsize * torch.Size(shape).numel() for name, shape in model.shapes.items())))
    writer = StepWriter(table.noting(weights.state()), dtypes, model, request)
    return _write(writer, {"direction": "neox -> neox", "source": str(request.source)}, table, finish)


def _write(writer: StepWriter, facts: Mapping[str, Any], table: Table, finish: Sequence[Finish]) -> Path:
    request, tag = writer.request, step_tag(writer.request.iteration)
    log.info("%s -> %s: %d tensor ranks, %d stages", facts["source"], request.out, request.tensor, request.pipe)
    with written_aside(request.out, overwrite=request.overwrite) as aside:
        (aside / tag).mkdir()
        writer.write(aside / tag)
        table.progress.close()
        layout = {"tensor": request.tensor, "pipe": request.pipe, "iteration": request.iteration}
        write_record(aside, {**facts, **layout, "padded_vocab_size": writer.model.spec.vocab_size}, table)
        for add in finish:
            add(aside)
        writer.write_manifest(aside / tag)
        write_latest(aside, tag)
    return request.out / tag


def check_shapes(source: Foreign, bound: Sequence[Bound], model: Described, stored: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError, naming the tensors, unless each has the shape that the configuration gives it."""
    if not source.cheap:
        return
    wrong = []
    for one in planned(bound, model, dict.fromkeys(model.shapes, torch.float32), None):
        found = tuple(stored[one.name].shape)
        if found != one.shape:
            wrong.append(f"{one.name}: {found} in the file, {one.shape} by its configuration")
    if wrong:
        what = f"weights and configuration differ. {summary(wrong, separator='; ')}"
        raise CheckpointError(what, where=str(source.path), fix="copy both from the same model")


_EMPTY = ("optimizer", "lr_scheduler", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "data_sampler", "random_ltd")


class StepWriter:
    """The files of a step. ours: whole tensors by canonical name, made on access; dtypes: theirs"""

    def __init__(self, ours: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], model: Described, request: OutputLayout) -> None:
        self.model, self.request = model, request
        self._ours, self._dtypes = ours, dtypes
        self._shardings = model.shardings(request.tensor)
        self._last = ("", torch.empty(0))
        # The order in which the files hold them.
        self._coming = ahead((name, ours[name]) for name in model.shapes)
        rows: Sequence[Bound] = ()
        if request.dialect is not None:
            spec = of_rank(model.spec, request.tensor)
            rows = list(bound_rows(family_named(request.dialect), spec, spec.vocab_size))
        self._rows = {row.ours: row for row in rows}

    def write(self, step: Path) -> None:
        """All files, into a folder that is there. Those of tensor ranks grow together, so that a tensor is made once for all of them."""
        pipe, ranks = self.request.pipe, range(self.request.tensor)
        weights = [self._of_rank(rank) for rank in ranks]
        if pipe:
            for slot in sorted({int(name.partition(".")[0]) for name in weights[0]}):
                begins = f"{slot}."
                parts = [{name.removeprefix(begins): one[name] for name in one if name.startswith(begins)} for one in weights]
                _together(parts, [step / layer_name(slot, rank) for rank in ranks])
        for stage in range(max(1, pipe)):
            # FORMAT: with a pipeline the weights are in the layers' files.
            modules = [None if pipe else {f"{SEQUENTIAL}{name}": later for name, later in one.items()} for one in weights]
            files = [model_file(step, stage * len(ranks) + rank) for rank in ranks]
            _together([{"module": module, **self._state()} for module in modules], files)

    def write_manifest(self, step: Path) -> None:
        """What all files of the folder hold."""
        tensor, pipe = self.request.tensor, self.request.pipe
        layout = {"pipe": max(1, pipe), "tensor": tensor, "pipelined": pipe > 0, "zero_stage": 0, "data": 1, "context": 1}
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        manifest = Manifest(step=self.request.iteration, files=files_in(step), layout=layout, code_version=code_version(), written=now)
        write_manifest(step, manifest)

    def _of_rank(self, rank: int) -> dict[str, Later]:
        """The tensors of a tensor rank by name, in the dialect asked for, in order of our slots."""
        found: dict[str, Later] = {}
        for name, shape in self.model.shapes.items():
            how = self._shardings.get(name, Replicated())
            part = split(torch.empty(shape, device="meta"), how, rank, self.request.tensor)
            dtype = self.request.precision.dtype or self._dtypes[name]
            row = self._rows.get(name)
            if row is None:
                found[name] = Later(shape=tuple(part.shape), dtype=dtype, make=partial(self._part, name, rank))
                continue
            for index, (theirs, piece) in enumerate(zip(row.theirs, row.op.unpack([part], row.place), strict=True)):
                found[theirs] = Later(shape=tuple(piece.shape), dtype=dtype, make=partial(self._spoken, row, index, rank))
        return found

    def _part(self, name: str, rank: int) -> Tensor:
        if self._last[0] != name:
            coming = next(self._coming, None)
            self._last = coming if coming is not None and coming[0] == name else (name, self._ours[name])
        return split(self._last[1], self._shardings.get(name, Replicated()), rank, self.request.tensor)

    def _spoken(self, row: Bound, index: int, rank: int) -> Tensor:
        return row.op.unpack([self._part(row.ours, rank)], row.place)[index]

    def _state(self) -> dict[str, Any]:
        """FORMAT: what DeepSpeed and GPT-NeoX look for beside the weights. There are no random states: it is loaded with `finetune`."""
        request = self.request
        empty = dict.fromkeys(_EMPTY)
        counts = {"global_steps": request.iteration, "global_samples": 0, "skipped_steps": 0, "iteration": request.iteration}
        sizes = {"dp_world_size": 1, "mp_world_size": request.tensor * max(1, request.pipe)}
        rest: dict[str, Any] = {"buffer_names": [], "shared_params": {}, "sparse_tensor_module_names": []}
        ours = {"run_state": {"optimizer": False, "samples": 0, "tokens": 0}}
        return {**empty, **counts, **sizes, **rest, **ours, "args": dict(request.args), "ds_config": {}, "ds_version": "0"}


def _together(contents: Sequence[Mapping[str, Any]], paths: Sequence[Path]) -> None:
    """Write files at the same time, a tensor of each after the other."""
    files = [streaming(content, path, plain=True) for content, path in zip(contents, paths, strict=True)]
    for _ in zip_longest(*files):
        pass
