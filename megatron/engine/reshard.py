# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint of any layout, optimizer included, into an engine of any other; tells the layout from the names of the files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron import deepspeed_private as private
from megatron.checkpoint.formats.neox_files import LAYER, MODEL, PARTITION, bookkeeping, copy_weights, matched, model_ranks, tensor_ranks
from megatron.checkpoint.formats.optimizer_files import read_optimizer, recorded
from megatron.checkpoint.formats.partitions import LAYOUT_FIX, OptimizerShard
from megatron.checkpoint.formats.torch_file import LazyState, canonical_name
from megatron.checkpoint.loading.merge_tp import Shard, Spreading, read_shards, width_over
from megatron.engine.deepspeed_mpu import whole_while_written
from megatron.engine.shards import Shards, local_shards_of
from megatron.errors import CheckpointError
from megatron.log import get_logger
from megatron.model.spec import ModelSpec
from megatron.mpu.groups import Groups

log = get_logger(__name__)

BOUND = frozenset({"SM3", "MuonWithAuxAdam"})
"""Optimizers whose state is that of one layout: their sums are not entry by entry, or they treat a part of a matrix as a whole one."""

ALIKE = ({"Adam", "AdamW", "DeepSpeedCPUAdam"},)
"""Optimizers that go on from each other's state."""


@dataclass(frozen=True, kw_only=True)
class CheckpointLayout:
    """What decides which files an engine writes, and which it can resume from as they are.

    pipelined:   the pipeline engine's form, one file per layer
    partitions:  ranks with the same weights over which ZeRO or bf16 sharded the optimizer; 0 = it is in one piece
    model_ranks: pipeline stages * tensor ranks, each with an optimizer of its own
    tensor_ranks: tensor ranks alone
    sharded:      no file holds whole weights (ZeRO 3)
    """

    pipelined: bool = False
    partitions: int = 0
    model_ranks: int = 1
    tensor_ranks: int = 1
    sharded: bool = False

    def __str__(self) -> str:
        stages = self.model_ranks // self.tensor_ranks
        parts = [f"pipeline of {stages} stage{'s' if stages > 1 else ''}" if self.pipelined else "no pipeline"]
        if self.tensor_ranks > 1:
            parts.append(f"{self.tensor_ranks} tensor ranks")
        shards = f"{self.partitions} part{'s' if self.partitions > 1 else ''}"
        parts.append(f"optimizer in {shards}" if self.partitions else "optimizer in one piece")
        return ", ".join(parts) + (", weights too (ZeRO-3)" if self.sharded else "")


def stored_layout(folder: Path) -> CheckpointLayout:
    """The layout of the files in a step's folder."""
    # FORMAT: optimizer partitions have files of their own; a whole optimizer is beside the weights.
    ranks = {match["data"] for _, match in matched(folder, PARTITION)}
    written = [match for _, match in matched(folder, MODEL)]
    models = len({match["model"] for match in written}) or 1
    layers = {match["tensor"] for _, match in matched(folder, LAYER)}
    return CheckpointLayout(
        pipelined=bool(layers),
        partitions=len(ranks),
        model_ranks=models,
        tensor_ranks=len(layers) or models,
        sharded=any(match["data"] for match in written),
    )


def stored_stages(folder: Path) -> int:
    """How many pipeline stages wrote a folder; 1 without a pipeline."""
    return model_ranks(folder) // max(1, tensor_ranks(folder))


def stored_state(folder: Path, groups: Groups) -> dict[str, Any]:
    """The bookkeeping that this rank goes on from: of its own pipeline stage where there were as many, else of the first."""
    rank = groups.pp.rank * tensor_ranks(folder) if stored_stages(folder) == groups.pp.size else 0
    return bookkeeping(folder, deepspeed_types=True, rank=rank)


def load_resharded(engine: Any, groups: Groups, folder: Path, spec: ModelSpec) -> dict[str, Any]:
    """Read weights and optimizer of `folder` into a fresh DeepSpeed engine; returns the bookkeeping. All ranks call it.

    Tensors are read one at a time. The learning-rate schedule is left to the caller.
    Raises CheckpointError where the optimizer's state is bound to a layout, or not that of this run's optimizer.
    """
    inner = private.inner_optimizer(engine.optimizer)
    refuse_other_optimizer(type(inner).__name__, recorded(folder, 0).get("kind"))
    optimizers, shards = read_optimizer(folder), read_shards(folder)
    refuse_other_numbers(inner.param_groups, optimizers[0].groups)
    spreading = Spreading(spec, len(shards), groups.tp, rows=width_over(shards, "word_embeddings.weight", 0))
    masters = spreading.weights([one.masters for one in optimizers])
    if missing := sorted({name for name, _ in trained_parameters(engine.module)} - set(masters)):
        raise CheckpointError(
            f"the checkpoint's optimizer does not have {', '.join(missing[:6])}", where=str(folder), fix="set `no_load_optim: true`"
        )
    slots = range(spec.num_layers + 5) if groups.pp.size > 1 else ()
    weights = _over(masters, spreading.weights(shards))
    copy_weights(weights, engine.module, folder, elsewhere=slots, gather=_whole if engine.zero_optimization_stage() == 3 else None)
    own = OptimizerShard(masters=masters, states=optimizers[0].states, scalars=optimizers[0].scalars, scaling=optimizers[0].scaling)
    adopt(engine, own, partial(_slice, optimizers, spreading), groups.replicas.rank)
    say_changed_numbers(optimizers[0].groups, inner.param_groups)
    state = stored_state(folder, groups)
    private.set_counters(engine, state)
    return state


def _slice(optimizers: Sequence[OptimizerShard], spreading: Spreading, key: str) -> Mapping[str, Tensor]:
    return spreading.states([one.states[key] for one in optimizers], key)


def _over(masters: Shard, weights: Shard) -> Shard:
    """The masters, and what is not trained as the weights have it."""
    return LazyState({name: partial((masters if name in masters else weights).__getitem__, name) for name in weights})


def _whole(tensors: Any) -> AbstractContextManager[Any]:
    return whole_while_written([tensor for tensor in tensors if private.is_partitioned(tensor)])


def put(shards: Shards, parameter: nn.Parameter, master: Tensor, states: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
    """Write what this rank keeps of a parameter. master, states: of the whole parameter"""
    place = shards.place(parameter)
    if place is None:
        return

    def fill(buffer: Tensor, whole: Tensor) -> None:
        buffer.view(-1).narrow(0, place.start, place.size).copy_(whole.flatten().narrow(0, place.first, place.size))

    fill(place.buffer.data, master)
    own = shards.state[place.buffer]
    for key, whole in states.items():
        if key not in own:
            # As the optimizer would make it at its first step.
            own[key] = torch.zeros_like(place.buffer, dtype=whole.dtype, memory_format=torch.contiguous_format)
        fill(own[key], whole)
    for key, value in scalars.items():
        own[key] = value.detach().clone() if isinstance(value, Tensor) else value


def trained_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are trained, each once, by canonical name."""
    return ((canonical_name(name), parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def adopt(engine: Any, optimizer: OptimizerShard, states_of: Callable[[str], Mapping[str, Tensor]], rank: int) -> None:
    """Write an optimizer into a fresh engine whose weights are there already.

    optimizer: its masters, scalars and numbers for this rank's tensor slice
    states_of: name of a state -> parameter -> this tensor rank's slice
    rank:      within the data parallel group
    Raises CheckpointError where the optimizer is not kept in memory.
    """
    if private.is_on_nvme(engine.optimizer):
        raise CheckpointError("a checkpoint of another layout is not read into an optimizer kept on NVMe", fix=LAYOUT_FIX)
    shards = local_shards_of(engine, lambda: 1.0, rank)
    states = {key: states_of(key) for key in optimizer.states}
    with torch.no_grad():
        for name, parameter in trained_parameters(engine.module):
            own = {key: whole[name] for key, whole in states.items() if name in whole}
            put(shards, parameter, optimizer.masters[name], own, optimizer.scalars.get(name, {}))
    scaler = private.loss_scaler_of(engine.optimizer)
    for key, value in optimizer.scaling.items():
        if scaler is not None and hasattr(scaler, key):
            setattr(scaler, key, value)


def refuse_other_optimizer(kind: str, stored: str | None) -> None:
    """Raise CheckpointError where an optimizer cannot go on from a checkpoint of another layout.

    kind, stored: class names of this run's optimizer and of the checkpoint's, where it tells
    """
    if kind in BOUND or stored in BOUND:
        bound = kind if kind in BOUND else stored
        raise CheckpointError(f"the optimizer {bound} goes on at the layout it was written at alone", fix=LAYOUT_FIX)
    if stored not in (None, kind) and not any({stored, kind} <= alike for alike in ALIKE):
        raise CheckpointError(f"the checkpoint is of another optimizer: {stored}, and this run's is {kind}", fix=OTHER_FIX)


def refuse_other_numbers(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> None:
    """Raise CheckpointError where this run's optimizer has a number of NUMBERS that the checkpoint's has not."""
    lacking = [key for key in NUMBERS if any(key in group for group in ours) and not any(key in group for group in theirs)]
    if theirs and lacking:
        raise CheckpointError(f"the checkpoint is of another optimizer: it has no {', '.join(lacking)}", fix=OTHER_FIX)


def say_changed_numbers(stored: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
    """One line per number that is not what it was in any group of the checkpoint."""
    for key in NUMBERS:
        before, now = ({plain(group[key]) for group in some if key in group} for some in (stored, groups))
        if before and now and before != now:
            log.warning("optimizer %s was %s in the checkpoint and is %s now", key, *(sorted(values, key=str) for values in (before, now)))


def plain(value: Any) -> Any:
    """A number, or a tuple in place of a list of numbers."""
    return tuple(value) if isinstance(value, (list, tuple)) else value


NUMBERS = ("weight_decay", "betas", "eps", "momentum")
"""Optimizer numbers that a configuration gives."""

OTHER_FIX = "set optimizer.type to the one it was trained with, or begin with a fresh one: `no_load_optim: true`"
