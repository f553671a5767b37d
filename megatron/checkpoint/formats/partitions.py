# SPDX-License-Identifier: Apache-2.0
"""One model rank's optimizer as tensors by parameter name, from each form in which DeepSpeed files it.

FORMAT: without ZeRO the optimizer is under "optimizer" of the model rank's file: torch's own state, or with it the float32 copies of
16-bit weights ("fp32_groups"). ZeRO 1 and 2 and the bfloat16 optimizer keep a flat float32 buffer per group, cut over the data ranks
wherever it falls, with a table name -> place in each rank's part. ZeRO 3 cuts every parameter into ceil(n / ranks) entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.checkpoint.formats.torch_file import LazyState, canonical_name
from megatron.errors import CheckpointError

LAYOUT_FIX = "resume with the layout it was written with, or take the weights alone: `no_load_optim: true` keeps the position, "
LAYOUT_FIX += "`finetune: true` starts anew"

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class OptimizerShard:
    """The optimizer of one rank by parameter name; tensors are made on access.

    masters: the float32 weights
    states:  name of a state (exp_avg, ...) -> parameter -> tensor of its shape
    scalars: parameter -> what is one number for all its entries (step, ...)
    groups:  the numbers of the optimizer's parameter groups
    scaling: numbers of the fp16 loss scaler; empty where there is none
    """

    masters: Mapping[str, Tensor]
    states: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    scalars: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    groups: Sequence[Mapping[str, Any]] = ()
    scaling: Mapping[str, Any] = field(default_factory=dict)


def whole_optimizer(content: Mapping[str, Any], names: Sequence[Sequence[str]], weights: Mapping[str, Tensor]) -> OptimizerShard:
    """An optimizer that is in one piece.

    content: "optimizer" of the model rank's file
    names:   of the parameters of each group
    weights: of the model rank; they are the masters of an optimizer that keeps no copies
    """
    inner = content.get("optimizer_state_dict", content)
    numbers = [number for group in inner["param_groups"] for number in group["params"]]
    listed = [name for group in names for name in group]
    if len(numbers) != len(listed):
        raise CheckpointError(f"the optimizer has {len(numbers)} parameters, and {len(listed)} are named")
    copies = [copy for group in content.get("fp32_groups", ()) for copy in group]
    masters = dict(zip(listed, copies, strict=True)) if copies else {name: weights[name] for name in listed}
    states: dict[str, dict[str, Tensor]] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for number, name in zip(numbers, listed, strict=True):
        for key, value in inner["state"].get(number, {}).items():
            if not isinstance(value, Tensor) or value.dim() == 0 and masters[name].dim() > 0:
                scalars.setdefault(name, {})[key] = value
            elif value.shape == masters[name].shape:
                states.setdefault(key, {})[name] = value
            else:
                raise _other_shape(key, name, value)
    return OptimizerShard(masters=masters, states=states, scalars=scalars, groups=inner["param_groups"], scaling=scaling_of(content))


def _other_shape(key: str, name: str, value: Tensor) -> CheckpointError:
    what = f"the optimizer's state {key} of {name} has the shape {tuple(value.shape)}, not the parameter's: it belongs to one layout"
    return CheckpointError(what, fix=LAYOUT_FIX)


@dataclass(frozen=True)
class _Place:
    """Where a run of a parameter's entries is: data rank, group, first entry, number of entries."""

    rank: int
    group: int
    start: int
    count: int


class _Flat(NamedTuple):
    """One data rank's flat buffers: masters and states by group."""

    masters: Sequence[Tensor]
    states: Sequence[Mapping[str, Any]]


def fragments(contents: Sequence[Mapping[str, Any]], shapes: Shapes) -> OptimizerShard:
    """ZeRO 1 and 2, and bfloat16 with float32 sums. contents: of each data rank; shapes: by canonical name"""
    _all_there(contents)
    places: dict[str, list[_Place]] = {}
    ranks = []
    for rank, content in enumerate(contents):
        for group, table in enumerate(content["param_slice_mappings"]):
            for name, address in table.items():
                places.setdefault(canonical_name(name), []).append(_Place(rank, group, int(address.start), int(address.numel)))
        ranks.append(_Flat(masters=content["single_partition_of_fp32_groups"], states=_states_by_group(content["base_optimizer_state"])))
    return _gathered(ranks, places, shapes, contents[0], contents[0]["base_optimizer_state"])


def partitions(contents: Sequence[Mapping[str, Any]], shapes: Sequence[Shapes]) -> OptimizerShard:
    """ZeRO 3. contents: of each data rank; shapes: of the parameters of each flat buffer, in their order

    A file without "optimizer_state_dict" has the masters alone.
    """
    _all_there(contents)
    places: dict[str, list[_Place]] = {}
    for group, table in enumerate(shapes):
        start = 0
        for name, shape in table.items():
            whole = math.prod(shape)
            part = -(-whole // len(contents))
            for rank in range(len(contents)):
                count = max(0, min(part, whole - rank * part))
                places.setdefault(name, []).append(_Place(rank, group, start, count))
            start += part
    ranks = [
        _Flat(masters=content["fp32_flat_groups"], states=_states_by_buffer(content.get("optimizer_state_dict"), len(shapes)))
        for content in contents
    ]
    whole_shapes = {name: shape for table in shapes for name, shape in table.items()}
    return _gathered(ranks, places, whole_shapes, contents[0], contents[0].get("optimizer_state_dict") or {})


def named_shapes(content: Mapping[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """Shapes by canonical name of the parameters in each flat buffer. content: of the model rank's file"""
    return [{canonical_name(name): tuple(shape) for name, shape in table.items()} for table in content["param_shapes"]]


def _all_there(contents: Sequence[Mapping[str, Any]]) -> None:
    count = contents[0].get("partition_count", len(contents))
    wanted = count if isinstance(count, int) else max(count, default=len(contents))
    if wanted != len(contents):
        found = f"{len(contents)} file{'s are' if len(contents) > 1 else ' is'} there"
        raise CheckpointError(f"the optimizer was spread over {wanted} ranks, and {found}", fix="check that all files were copied")


def _states_by_group(base: Any) -> list[Mapping[str, Any]]:
    # FORMAT: with elastic_checkpoint a list of states, else torch's state of an optimizer with one flat parameter per group.
    if isinstance(base, list):
        return list(base)
    return [base["state"].get(group["params"][0], {}) for group in base["param_groups"]]


def _states_by_buffer(base: Any, buffers: int) -> list[Mapping[str, Any]]:
    return [{} if base is None else base["state"].get(number, {}) for number in range(buffers)]


def _gathered(
    ranks: Sequence[_Flat], places: Mapping[str, Sequence[_Place]], shapes: Shapes, content: Mapping[str, Any], base: Any
) -> OptimizerShard:
    for name, found in places.items():
        if name not in shapes or sum(place.count for place in found) != math.prod(shapes[name]):
            what = f"the parts of {name} in the optimizer's files are not the whole of it"
            raise CheckpointError(what, fix="check that all files are there")
    scalars: dict[str, dict[str, Any]] = {}
    makers: dict[str, dict[str, Callable[[], Tensor]]] = {}
    for name, found in places.items():
        first = next((place for place in found if place.count), found[0])
        for key, value in ranks[first.rank].states[first.group].items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                scalars.setdefault(name, {})[key] = value
            elif value.numel() >= ranks[first.rank].masters[first.group].numel():
                makers.setdefault(key, {})[name] = partial(_joined, ranks, found, shapes[name], key)
            else:
                raise _other_shape(key, name, value)
    return OptimizerShard(
        masters=LazyState({name: partial(_joined, ranks, found, shapes[name], None) for name, found in places.items()}),
        states={key: LazyState(made) for key, made in makers.items()},
        scalars=scalars,
        groups=base.get("param_groups", ()) if isinstance(base, Mapping) else (),
        scaling=scaling_of(content),
    )


def _joined(ranks: Sequence[_Flat], places: Sequence[_Place], shape: Sequence[int], key: str | None) -> Tensor:
    parts = [part for part in _parts(ranks, places, key) if part.numel()]
    flat = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.zeros(0)
    return flat.view(tuple(shape))


def _parts(ranks: Sequence[_Flat], places: Sequence[_Place], key: str | None) -> Iterator[Tensor]:
    for place in places:
        flat = ranks[place.rank].masters[place.group] if key is None else ranks[place.rank].states[place.group][key]
        yield flat.detach().narrow(0, place.start, place.count)


_SCALING = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def scaling_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of the dynamic fp16 loss scaler: of the object that ZeRO keeps, or flat as other optimizers keep them."""
    scaler = content.get("loss_scaler")
    if not content.get("dynamic_loss_scale"):
        return {}
    found = {key: getattr(scaler, key, None) if scaler is not None else content.get(key) for key in _SCALING}
    return {key: value for key, value in found.items() if value is not None}
