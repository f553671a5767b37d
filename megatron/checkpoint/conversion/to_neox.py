# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory -> a step's folder for any number of tensor ranks and stages, one tensor of ours in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.conversion.folder import check_free, written_aside
from megatron.checkpoint.conversion.model import Described, NeoXChoice
from megatron.checkpoint.conversion.table import Noted, Progress, Table, write_record
from megatron.checkpoint.durable import digest_of
from megatron.checkpoint.families.registry import family_of
from megatron.checkpoint.hf_store import read_config, read_state
from megatron.checkpoint.manifest import Manifest, write_manifest
from megatron.checkpoint.mapping import Bound, bound_rows, to_canonical, usual_names
from megatron.checkpoint.neox_store import model_file
from megatron.checkpoint.provenance import code_version
from megatron.checkpoint.state import SEQUENTIAL
from megatron.checkpoint.steps import step_tag, write_latest
from megatron.checkpoint.streaming import Later, streaming
from megatron.checkpoint.whole import shardings_of
from megatron.errors import CheckpointError
from megatron.log import get_logger
from megatron.mpu.sharding import Replicated, Sharding, split

log = get_logger(__name__)

Finish = Callable[[Path], None]


def convert_to_neox(hf: Path, out: Path, model: Described, choice: NeoXChoice, *, finish: Sequence[Finish] = ()) -> Path:
    """Write the weights of the Hugging Face directory `hf` as a checkpoint in `out`; returns the step's folder.

    Nothing is left at `out` when anything fails. Raises CheckpointError for files that are damaged, missing or of another model.
    """
    check_free(out, overwrite=choice.overwrite)
    config = read_config(hf)
    family, rows = family_of(config), int(config["vocab_size"])
    stored = read_state(hf)
    total = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    table = Table(Progress("converting", total))
    ours = to_canonical(family, Noted(stored, table), model.spec)
    bound = list(bound_rows(family, model.spec, rows))
    theirs = usual_names(family, stored, {name for row in bound for name in row.theirs})
    check_shapes(hf, bound, model, theirs)
    dtypes = {row.ours: theirs[row.theirs[0]].dtype for row in bound}
    log.info("%s -> %s: %s, %d tensor ranks, %d stages", hf, out, family.hf, choice.tensor, choice.pipe)
    tag = step_tag(choice.iteration)
    with written_aside(out, overwrite=choice.overwrite) as aside:
        step = aside / tag
        step.mkdir()
        _Writer(step, ours, dtypes, model, choice).write()
        table.progress.close()
        facts = {"direction": "hf -> neox", "source": str(hf), "architecture": family.hf, "vocab_size": rows, "source_config": config}
        layout = {"tensor": choice.tensor, "pipe": choice.pipe, "iteration": choice.iteration}
        write_record(aside, {**facts, **layout, "padded_vocab_size": model.spec.vocab_size}, table)
        for add in finish:
            add(aside)
        write_manifest(step, _manifest(step, model, choice))
        write_latest(aside, tag)
    return out / tag


def check_shapes(hf: Path, bound: Sequence[Bound], model: Described, stored: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError, naming the tensors, unless each has the shape that config.json gives it."""
    wrong = []
    for row in bound:
        parts = row.op.unpack([torch.empty(model.shapes[row.ours], device="meta")], row.place)
        for name, part in zip(row.theirs, parts, strict=True):
            found = tuple(stored[name].shape)
            if found != tuple(part.shape):
                wrong.append(f"{name}: {found} in the file, {tuple(part.shape)} by config.json")
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise CheckpointError(
            "weights and config.json differ. " + "; ".join(wrong[:6]) + more, where=str(hf), mend="copy both from the same model"
        )


_EMPTY = (
    "optimizer",
    "lr_scheduler",
    "param_shapes",
    "frozen_param_shapes",
    "frozen_param_fragments",
    "data_sampler",
    "random_ltd",
)


class _Writer:
    """The files of a step."""

    def __init__(
        self, step: Path, ours: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], model: Described, choice: NeoXChoice
    ) -> None:
        self._step, self._ours, self._dtypes, self._choice = step, ours, dtypes, choice
        self._shardings = shardings_of(model.spec, choice.tensor) if choice.tensor > 1 else {}
        self._shapes = model.shapes
        self._last = ("", torch.empty(0))

    def write(self) -> None:
        """All files. Those of the tensor ranks grow together, so that a tensor is made once for all of them."""
        choice, ranks = self._choice, range(self._choice.tensor)
        weights = [{name: self._later(name, rank) for name in self._shapes} for rank in ranks]
        if choice.pipe:
            for slot in sorted({int(name.partition(".")[0]) for name in self._shapes}):
                begins = f"{slot}."
                parts = [{name.removeprefix(begins): one[name] for name in one if name.startswith(begins)} for one in weights]
                self._together(parts, [f"layer_{slot:02d}-model_{rank:02d}-model_states.pt" for rank in ranks])
        for stage in range(max(1, choice.pipe)):
            # FORMAT: with a pipeline the weights are in the layers' files.
            modules = [None if choice.pipe else {f"{SEQUENTIAL}{name}": later for name, later in one.items()} for one in weights]
            names = [model_file(self._step, stage * choice.tensor + rank).name for rank in ranks]
            self._together([{"module": module, **self._state()} for module in modules], names)

    def _together(self, contents: Sequence[Any], names: Sequence[str]) -> None:
        files = [streaming(content, self._step / name, plain=True) for content, name in zip(contents, names, strict=True)]
        for _ in zip_longest(*files):
            pass

    def _later(self, name: str, rank: int) -> Later:
        how = self._shardings.get(name, Replicated())
        shape = split(torch.empty(self._shapes[name], device="meta"), how, rank, self._choice.tensor).shape
        dtype = self._choice.precision.dtype or self._dtypes[name]
        return Later(shape=tuple(shape), dtype=dtype, make=partial(self._make, name, how, rank))

    def _make(self, name: str, how: Sharding, rank: int) -> Tensor:
        if self._last[0] != name:
            self._last = (name, self._ours[name])
        return split(self._last[1], how, rank, self._choice.tensor)

    def _state(self) -> dict[str, Any]:
        """FORMAT: what DeepSpeed and GPT-NeoX look for beside the weights. There are no random states: it is loaded with `finetune`."""
        choice = self._choice
        empty = dict.fromkeys(_EMPTY)
        counts = {"global_steps": choice.iteration, "global_samples": 0, "skipped_steps": 0, "iteration": choice.iteration}
        sizes = {"dp_world_size": 1, "mp_world_size": choice.tensor * max(1, choice.pipe)}
        rest: dict[str, Any] = {
            "buffer_names": [],
            "shared_params": {},
            "data_sampler": None,
            "random_ltd": None,
            "sparse_tensor_module_names": [],
        }
        ours = {"run_state": {"optimizer": False, "samples": 0, "tokens": 0}}
        return {**empty, **counts, **sizes, **rest, **ours, "args": dict(choice.args), "ds_config": {}, "ds_version": "0"}


def _manifest(step: Path, model: Described, choice: NeoXChoice) -> Manifest:
    files = {path.relative_to(step).as_posix(): digest_of(path) for path in sorted(step.rglob("*")) if path.is_file()}
    layout = {"pipe": max(1, choice.pipe), "tensor": choice.tensor, "pipelined": choice.pipe > 0, "zero_stage": 0, "data": 1, "context": 1}
    return Manifest(
        step=choice.iteration,
        run_id="",
        files=files,
        samples=0,
        tokens=0,
        layout=layout,
        code_version=code_version(),
        config={},
        data={},
        written=datetime.now(UTC).isoformat(timespec="seconds"),
    )
