# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory -> a step's folder for any number of tensor ranks and stages, one tensor of ours in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
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
from megatron.checkpoint.mapping import Bound, Family, bound_rows, to_canonical
from megatron.checkpoint.neox_store import model_file
from megatron.checkpoint.provenance import code_version
from megatron.checkpoint.state import SEQUENTIAL
from megatron.checkpoint.steps import step_tag, write_latest
from megatron.checkpoint.streaming import Later, save_streaming
from megatron.checkpoint.whole import shapes_of, shardings_of
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
    ours = to_canonical(family, stored, model.spec)
    bound = list(bound_rows(family, model.spec, rows))
    check_shapes(hf, bound, model, to_theirs(family, stored, bound))
    ours = to_canonical(family, Noted(stored, table), model.spec)
    log.info("%s -> %s: %s, %d tensor ranks, %d stages", hf, out, family.hf, choice.tensor, choice.pipe)
    tag = step_tag(choice.iteration)
    with written_aside(out, overwrite=choice.overwrite) as aside:
        step = aside / tag
        step.mkdir()
        writer = _Writer(step, ours, model, choice)
        for rank in range(choice.tensor):
            writer.write_rank(rank)
        table.progress.close()
        facts = {"direction": "hf -> neox", "source": str(hf), "architecture": family.hf, "vocab_size": rows, "source_config": config}
        layout = {"tensor": choice.tensor, "pipe": choice.pipe, "iteration": choice.iteration}
        write_record(aside, {**facts, **layout, "padded_vocab_size": model.spec.vocab_size}, table)
        for add in finish:
            add(aside)
        write_manifest(step, _manifest(step, model, choice))
        write_latest(aside, tag)
    return out / tag


def to_theirs(family: Family, stored: Mapping[str, Tensor], bound: Sequence[Bound]) -> Mapping[str, Tensor]:
    """The stored tensors under the names that the rows use."""
    from megatron.checkpoint.mapping import usual_names

    return usual_names(family, stored, {name for row in bound for name in row.theirs})


def check_shapes(hf: Path, bound: Sequence[Bound], model: Described, stored: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError, naming the tensors, unless each has the shape that config.json gives it."""
    shapes = shapes_of(model.spec)
    wrong = []
    for row in bound:
        parts = row.op.unpack([torch.empty(shapes[row.ours], device="meta")], row.place)
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
    """The files of a step, one tensor rank after the other."""

    def __init__(self, step: Path, ours: Mapping[str, Tensor], model: Described, choice: NeoXChoice) -> None:
        self._step, self._ours, self._choice, self._model = step, ours, choice, model
        self._shardings = shardings_of(model.spec, choice.tensor)
        self._shapes = shapes_of(model.spec)

    def write_rank(self, rank: int) -> None:
        """All files of one tensor rank."""
        choice = self._choice
        weights = {name: self._later(name, rank) for name in self._shapes}
        slots = sorted({int(name.partition(".")[0]) for name in weights})
        if choice.pipe:
            for slot in slots:
                of_slot = {name.partition(".")[2]: later for name, later in weights.items() if name.startswith(f"{slot}.")}
                save_streaming(of_slot, self._step / f"layer_{slot:02d}-model_{rank:02d}-model_states.pt")
        for stage in range(max(1, choice.pipe)):
            # FORMAT: with a pipeline the weights are in the layers' files.
            module = None if choice.pipe else {f"{SEQUENTIAL}{name}": later for name, later in weights.items()}
            save_streaming({"module": module, **self._state()}, model_file(self._step, stage * choice.tensor + rank))

    def _later(self, name: str, rank: int) -> Later:
        how = self._shardings.get(name, Replicated())
        shape = split(torch.empty(self._shapes[name], device="meta"), how, rank, self._choice.tensor).shape
        dtype = self._choice.precision.dtype or self._ours[name].dtype
        return Later(shape=tuple(shape), dtype=dtype, make=partial(self._make, name, how, rank))

    def _make(self, name: str, how: Sharding, rank: int) -> Tensor:
        return split(self._ours[name], how, rank, self._choice.tensor)

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
