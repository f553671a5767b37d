# SPDX-License-Identifier: Apache-2.0
"""Writes a step's folder, one tensor in memory at a time, for any number of tensor ranks and stages. Knows no other side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.atomic_io import digest_of
from megatron.checkpoint.conversion.model import Described, NeoXChoice
from megatron.checkpoint.conversion.weights import ahead
from megatron.checkpoint.formats.neox_files import layer_name, model_file
from megatron.checkpoint.formats.torch_file import SEQUENTIAL, Later, streaming
from megatron.checkpoint.mapping.dialects import of_rank
from megatron.checkpoint.mapping.families import family_named
from megatron.checkpoint.mapping.rows import Bound, bound_rows
from megatron.checkpoint.steps.manifest import Manifest, write_manifest
from megatron.mpu.sharding import Replicated, split
from megatron.provenance import code_version

_EMPTY = (
    "optimizer",
    "lr_scheduler",
    "param_shapes",
    "frozen_param_shapes",
    "frozen_param_fragments",
    "data_sampler",
    "random_ltd",
)


class StepWriter:
    """The files of a step.

    step: a folder that is there; ours: whole tensors by canonical name, made on access; dtypes: theirs
    """

    def __init__(
        self, step: Path, ours: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], model: Described, choice: NeoXChoice
    ) -> None:
        self._step, self._ours, self._dtypes, self._choice, self._model = step, ours, dtypes, choice, model
        self._shardings = model.shardings(choice.tensor)
        self._last = ("", torch.empty(0))
        # The order in which the files hold them.
        self._coming = ahead((name, ours[name]) for name in model.shapes)
        rows: Sequence[Bound] = ()
        if choice.dialect is not None:
            spec = of_rank(model.spec, choice.tensor)
            rows = list(bound_rows(family_named(choice.dialect), spec, spec.vocab_size))
        self._rows = {row.ours: row for row in rows}

    def write(self) -> None:
        """All files. Those of the tensor ranks grow together, so that a tensor is made once for all of them."""
        choice, ranks = self._choice, range(self._choice.tensor)
        weights = [self._of_rank(rank) for rank in ranks]
        if choice.pipe:
            for slot in sorted({int(name.partition(".")[0]) for name in weights[0]}):
                begins = f"{slot}."
                parts = [{name.removeprefix(begins): one[name] for name in one if name.startswith(begins)} for one in weights]
                self._together(parts, [layer_name(slot, rank) for rank in ranks])
        for stage in range(max(1, choice.pipe)):
            # FORMAT: with a pipeline the weights are in the layers' files.
            modules = [None if choice.pipe else {f"{SEQUENTIAL}{name}": later for name, later in one.items()} for one in weights]
            names = [model_file(self._step, stage * choice.tensor + rank).name for rank in ranks]
            self._together([{"module": module, **self._state()} for module in modules], names)

    def write_manifest(self) -> None:
        """What all files of the folder hold."""
        choice = self._choice
        files = {path.relative_to(self._step).as_posix(): digest_of(path) for path in sorted(self._step.rglob("*")) if path.is_file()}
        layout = {"pipe": max(1, choice.pipe), "tensor": choice.tensor, "pipelined": choice.pipe > 0, "zero_stage": 0, "data": 1}
        manifest = Manifest(
            step=choice.iteration,
            run_id="",
            files=files,
            samples=0,
            tokens=0,
            layout={**layout, "context": 1},
            code_version=code_version(),
            config={},
            data={},
            written=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        write_manifest(self._step, manifest)

    def _together(self, contents: Sequence[Any], names: Sequence[str]) -> None:
        files = [streaming(content, self._step / name, plain=True) for content, name in zip(contents, names, strict=True)]
        for _ in zip_longest(*files):
            pass

    def _of_rank(self, rank: int) -> dict[str, Later]:
        """The tensors of a tensor rank by name, in the dialect asked for, in order of our slots."""
        found: dict[str, Later] = {}
        for name, shape in self._model.shapes.items():
            how = self._shardings.get(name, Replicated())
            part = split(torch.empty(shape, device="meta"), how, rank, self._choice.tensor)
            dtype = self._choice.precision.dtype or self._dtypes[name]
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
        return split(self._last[1], self._shardings.get(name, Replicated()), rank, self._choice.tensor)

    def _spoken(self, row: Bound, index: int, rank: int) -> Tensor:
        return row.op.unpack([self._part(row.ours, rank)], row.place)[index]

    def _state(self) -> dict[str, Any]:
        """FORMAT: what DeepSpeed and GPT-NeoX look for beside the weights. There are no random states: it is loaded with `finetune`."""
        choice = self._choice
        empty = dict.fromkeys(_EMPTY)
        counts = {"global_steps": choice.iteration, "global_samples": 0, "skipped_steps": 0, "iteration": choice.iteration}
        sizes = {"dp_world_size": 1, "mp_world_size": choice.tensor * max(1, choice.pipe)}
        rest: dict[str, Any] = {"buffer_names": [], "shared_params": {}, "sparse_tensor_module_names": []}
        ours = {"run_state": {"optimizer": False, "samples": 0, "tokens": 0}}
        return {**empty, **counts, **sizes, **rest, **ours, "args": dict(choice.args), "ds_config": {}, "ds_version": "0"}
