# SPDX-License-Identifier: Apache-2.0
"""A checkpoint rewritten for other numbers of tensor ranks and pipeline stages, a piece at a time."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.formats.neox_files import bookkeeping, layer_name, model_dtypes, model_file, tensor_ranks
from megatron.checkpoint.formats.optimizer_files import RECORD, read_optimizer, recorded
from megatron.checkpoint.formats.partitions import OptimizerShard
from megatron.checkpoint.formats.torch_file import SEQUENTIAL, Later, canonical_state, save_streaming
from megatron.checkpoint.loading.merge_tp import Shard, Spreading, read_shards, width_over, with_vocabulary
from megatron.checkpoint.steps.manifest import Manifest, files_in, read_manifest, write_manifest
from megatron.checkpoint.steps.step_dirs import publish, step_of, write_latest
from megatron.errors import CheckpointError
from megatron.model.spec import ModelSpec
from megatron.model.transformer import Transformer
from megatron.mpu.groups import Group, Groups

AT_ONCE = 32 << 20
"""Bytes that are read before their memory is given back."""

_OF_A_RANK = ("module", "optimizer", "param_shapes", "shared_params", "frozen_param_shapes", "frozen_param_fragments", "buffer_names")


@dataclass(frozen=True, kw_only=True)
class Target:
    """tensor ranks; pipeline stages, or 0: the form without a pipeline"""

    tensor: int
    pipe: int

    @property
    def stages(self) -> int:
        """How many bookkeeping files there are for a tensor rank."""
        return max(1, self.pipe)


class _Source:
    """A step's tensors, cut for one rank of the target; after every AT_ONCE bytes the pages that were read are let go of."""

    def __init__(self, folder: Path, spec: ModelSpec, tp: Group) -> None:
        self._folder = folder
        self._read = 0
        shards = read_shards(folder)
        optimizers = read_optimizer(folder) if has_optimizer(folder) else []
        self.ranks = len(shards)
        self.optimizer: OptimizerShard | None = optimizers[0] if optimizers else None
        spreading = Spreading(spec, len(shards), tp, rows=width_over(shards, "word_embeddings.weight", 0))
        self._parts: dict[str, Shard] = {"": spreading.weights(shards)}
        if optimizers:
            self._parts["master"] = spreading.weights([one.masters for one in optimizers])
            for key in optimizers[0].states:
                self._parts[key] = spreading.states([one.states[key] for one in optimizers], key)

    def dtype(self, key: str) -> torch.dtype:
        """Of a state's tensors."""
        part = self._parts[key]
        return part[next(iter(part))].dtype

    def has(self, key: str, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._parts[key]

    def take(self, key: str, name: str) -> Tensor:
        """A weight (""), a float32 master ("master") or a state."""
        if self._read > AT_ONCE:
            self._read = 0
            let_go(self._folder)
        tensor = self._parts[key][name]
        # All tensor ranks' parts of it may have been read.
        self._read += tensor.numel() * tensor.element_size() * self.ranks
        return tensor


def let_go(folder: Path) -> None:
    """Give back the memory of what was read of the mapped files in a folder; whoever reads on gets it from the disk again. Linux only."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    libc = ctypes.CDLL(None)
    for line in maps.read_text().splitlines():
        place, *_, path = line.split(maxsplit=5)
        if path.startswith(f"{folder}{os.sep}"):
            start, end = (int(number, 16) for number in place.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)


_DONTNEED = 4  # sys/mman.h; nothing was written to these pages, so nothing is lost


def has_optimizer(folder: Path) -> bool:
    """Whether a step was saved with its optimizer."""
    return (bookkeeping(folder, deepspeed_types=True).get("run_state") or {}).get("optimizer") is not False


def target_rows(rows: int, args: Mapping[str, Any], tensor: int) -> int:
    """Rows of the vocabulary that `tensor` ranks can share: filled up to the multiple that the configuration asks for.

    >>> target_rows(384, {"make_vocab_size_divisible_by": 128}, 2), target_rows(512, {}, 2)
    (512, 512)
    """
    unit = int(args.get("make_vocab_size_divisible_by") or 1) * tensor
    return -(-rows // unit) * unit


def reshard(source: Path, directory: Path, spec: ModelSpec, target: Target) -> Path:
    """Write the step in folder `source` to `directory`, spread as `target` says; returns the new step's folder.

    spec: the model as it was saved
    Weights have NeoX's names and form. The optimizer is in one piece per file, with the names of its parameters, and is taken up at
    any ZeRO stage and number of data ranks.
    """
    final = directory / source.name
    if final.exists():
        raise CheckpointError("there is a checkpoint of this step already", where=str(final), fix="choose another folder")
    args = bookkeeping(source, deepspeed_types=True).get("args") or {}
    spec = with_vocabulary(spec, target_rows(spec.vocab_size, args, target.tensor))
    aside = directory / f"{source.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for rank in range(target.tensor):
        tp = Group(rank=rank, size=target.tensor, ranks=tuple(range(target.tensor)))
        _write_rank(_Source(source, spec, tp), source, aside, spec, tp, target)
    if (source / "configs").is_dir():
        shutil.copytree(source / "configs", aside / "configs")
    write_manifest(aside, _manifest(source, aside, target))
    publish(aside, final)
    write_latest(directory, final.name)
    return final


def _write_rank(tensors: _Source, source: Path, aside: Path, spec: ModelSpec, tp: Group, target: Target) -> None:
    """All files of one tensor rank."""
    model = canonical_state(Transformer(spec, groups=Groups(tp=tp), device="meta"))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.items()}
    # Under ZeRO-3 the files have float32 weights only.
    kinds = model_dtypes(source) or {name: tensor.dtype for name, tensor in read_shards(source)[0].items()}
    weights = {name: Later(shape=shapes[name], dtype=kinds[name], make=partial(tensors.take, "", name)) for name in shapes}
    slots = sorted({int(name.partition(".")[0]) for name in shapes})
    if target.pipe:
        for slot in slots:
            of_slot = {name.partition(".")[2]: later for name, later in weights.items() if name.startswith(f"{slot}.")}
            save_streaming(of_slot, aside / layer_name(slot, tp.rank))
    for stage in range(target.stages):
        chosen = [slot for number, slot in enumerate(slots) if number * target.stages // len(slots) == stage]
        names = [name for name in shapes if int(name.partition(".")[0]) in chosen]
        # FORMAT: with a pipeline the weights are in the layers' files.
        module = None if target.pipe else {f"{SEQUENTIAL}{name}": later for name, later in weights.items()}
        content = _bookkeeping(source, target, stage, spec.vocab_size)
        if tensors.optimizer is None:
            save_streaming({"module": module, "optimizer": None, **content}, model_file(aside, stage * tp.size + tp.rank))
            continue
        names = [name for name in names if tensors.has("master", name)]
        groups = [names, *([[]] * (max(1, len(tensors.optimizer.groups)) - 1))]
        record = {"form": "resharded", "kind": recorded(source, 0).get("kind"), "groups": groups}
        optimizer = _optimizer(tensors, tensors.optimizer, shapes, names, all(kind == torch.float32 for kind in kinds.values()))
        save_streaming({"module": module, "optimizer": optimizer, **content, RECORD: record}, model_file(aside, stage * tp.size + tp.rank))


def _optimizer(
    tensors: _Source, numbers: OptimizerShard, shapes: Mapping[str, Sequence[int]], names: list[str], whole: bool
) -> dict[str, Any]:
    """whole: the weights are their own masters"""
    state = {}
    for number, name in enumerate(names):
        keys = [key for key in numbers.states if tensors.has(key, name)]
        made = {key: Later(shape=shapes[name], dtype=tensors.dtype(key), make=partial(tensors.take, key, name)) for key in keys}
        state[number] = {**numbers.scalars.get(name, {}), **made}
    given = [dict(group) for group in numbers.groups] or [{}]
    groups = [{**group, "params": list(range(len(names))) if group is given[0] else []} for group in given]
    inner = {"state": state, "param_groups": groups}
    if whole:
        return inner
    masters = [Later(shape=shapes[name], dtype=torch.float32, make=partial(tensors.take, "master", name)) for name in names]
    scaling = {"dynamic_loss_scale": bool(numbers.scaling), **numbers.scaling}
    return {"optimizer_state_dict": inner, "fp32_groups": [masters], **scaling}


def _bookkeeping(source: Path, target: Target, stage: int, rows: int) -> dict[str, Any]:
    """The client state and DeepSpeed's counts; that of the same stage where there were as many."""
    ranks = tensor_ranks(source)
    found = bookkeeping(source, deepspeed_types=True, rank=stage * ranks) or bookkeeping(source, deepspeed_types=True)
    kept = {key: value for key, value in found.items() if key not in (*_OF_A_RANK, RECORD)}
    args = {**(kept.get("args") or {}), "model_parallel_size": target.tensor}
    if "padded_vocab_size" in args:
        args["padded_vocab_size"] = rows
    return {**kept, "args": args, "dp_world_size": 1, "mp_world_size": target.tensor * target.stages}


def _manifest(source: Path, aside: Path, target: Target) -> Manifest:
    state = bookkeeping(source, deepspeed_types=True)
    ours = state.get("run_state") or {}
    known = read_manifest(source)
    if known is None:
        known = Manifest(step=step_of(source.name) or 0, samples=int(ours.get("samples", 0)), tokens=int(ours.get("tokens", 0)))
    layout = {**known.layout, "pipe": target.stages, "tensor": target.tensor, "pipelined": target.pipe > 0, "zero_stage": 0, "data": 1}
    return replace(known, layout=layout, files=files_in(aside))
