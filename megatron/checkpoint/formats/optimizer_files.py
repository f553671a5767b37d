# SPDX-License-Identifier: Apache-2.0
"""The optimizer in a step's folder by canonical parameter name, whatever layout wrote it."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from megatron.checkpoint.formats.neox_files import bookkeeping_file, model_ranks, partition_files, read_weights, slot_of, tensor_ranks
from megatron.checkpoint.formats.partitions import LAYOUT_FIX, OptimizerShard, fragments, named_shapes, partitions, whole_optimizer
from megatron.checkpoint.formats.torch_file import read_torch_file
from megatron.errors import CheckpointError

RECORD = "optimizer_parameters"
"""Key of a model rank's file: {"form": what keeps the optimizer, "kind": the optimizer, "groups": canonical names, group by group}."""


NAMELESS = "the checkpoint does not say which parameters its optimizer's numbers belong to, so they cannot be resharded"


def read_optimizer(folder: Path) -> list[OptimizerShard]:
    """The optimizer of every tensor rank, that of all pipeline stages together.

    Raises CheckpointError where there is none, or where its parameters' names cannot be known.
    """
    ranks = tensor_ranks(folder)
    if ranks == 0:
        raise CheckpointError("no optimizer in the checkpoint folder", where=str(folder), fix="check that all its files were copied")
    found: list[list[OptimizerShard]] = [[] for _ in range(ranks)]
    for model_rank in range(model_ranks(folder)):
        try:
            # FORMAT: model ranks count stages, and within a stage tensor ranks.
            before = found[model_rank % ranks]
            before.append(_of_model_rank(folder, model_rank, model_rank % ranks, {name for one in before for name in one.masters}))
        except CheckpointError as error:
            raise CheckpointError(error.what, where=error.where or str(bookkeeping_file(folder, model_rank)), fix=error.fix) from error
    return [_over_stages(stages) for stages in found]


def recorded(folder: Path, model_rank: int) -> Mapping[str, Any]:
    """What a model rank's file says of its optimizer's parameters; empty for files of others."""
    path = bookkeeping_file(folder, model_rank)
    content = read_torch_file(path, deepspeed_types=True) if path.is_file() else {}
    record: Mapping[str, Any] = content.get(RECORD) or {}
    return record


def _of_model_rank(folder: Path, model_rank: int, tensor_rank: int, taken: set[str]) -> OptimizerShard:
    """taken: parameters of the stages before"""
    content = read_torch_file(bookkeeping_file(folder, model_rank), deepspeed_types=True)
    files = partition_files(folder, model_rank)
    if not files:
        if not content.get("optimizer"):
            raise CheckpointError("the checkpoint has no optimizer", fix="set `no_load_optim: true`")
        groups, weights = (content.get(RECORD) or {}).get("groups"), read_weights(folder, tensor_rank)
        groups = groups or _told_by_order(content["optimizer"], {name: weights[name] for name in weights if name not in taken})
        if groups is None:
            raise CheckpointError(NAMELESS, fix=LAYOUT_FIX)
        return whole_optimizer(content["optimizer"], groups, weights)
    parts = [read_torch_file(path, deepspeed_types=True)["optimizer_state_dict"] for path in files]
    if "fp32_flat_groups" in parts[0]:
        return partitions(parts, named_shapes(content))
    if "param_slice_mappings" not in parts[0]:
        raise CheckpointError(NAMELESS, fix=LAYOUT_FIX)
    weights = read_weights(folder, tensor_rank)
    return fragments(parts, {name: tuple(tensor.shape) for name, tensor in weights.items()})


def _told_by_order(content: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[list[str]] | None:
    """The parameters of a stage whose file does not name them: those of so many of the next layers as it has numbers for."""
    slots = sorted({slot_of(name) for name in weights})
    for count in range(1, len(slots) + 1):
        of_stage = {name: tensor for name, tensor in weights.items() if slot_of(name) in slots[:count]}
        if (names := _names_in_order(content, of_stage)) is not None:
            return names
    return None


def _names_in_order(content: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[list[str]] | None:
    """The parameters of each group of an optimizer whose file does not name them; None where they cannot be told.

    FORMAT: GPT-NeoX keeps two groups, of the matrices and of the vectors, both in the order of the module. Every state must have the
    shape of the parameter that it would belong to.
    content: "optimizer" of a model rank's file; weights: of that rank, all of them
    """
    inner = content.get("optimizer_state_dict", content)
    matrices = [name for name, tensor in weights.items() if tensor.dim() > 1]
    names = [matrices, [name for name in weights if name not in set(matrices)]]
    if [len(group["params"]) for group in inner["param_groups"]] != [len(group) for group in names]:
        return None
    for numbers, group in zip(inner["param_groups"], names, strict=True):
        for number, name in zip(numbers["params"], group, strict=True):
            states = [value for value in inner["state"].get(number, {}).values() if isinstance(value, Tensor) and value.dim()]
            if any(value.shape != weights[name].shape for value in states):
                return None
    return names


def _over_stages(stages: Sequence[OptimizerShard]) -> OptimizerShard:
    """Pipeline stages as one. What two of them hold, tied weights, is the same on both."""
    if len(stages) == 1:
        return stages[0]
    keys = sorted({key for stage in stages for key in stage.states})
    return OptimizerShard(
        masters=_any_of([stage.masters for stage in stages]),
        states={key: _any_of([stage.states[key] for stage in stages if key in stage.states]) for key in keys},
        scalars={name: numbers for stage in stages for name, numbers in stage.scalars.items()},
        groups=[group for stage in stages for group in stage.groups],
        scaling=stages[0].scaling,
    )


def _any_of(maps: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    return ChainMap(*[cast(dict[str, Tensor], one) for one in maps])
