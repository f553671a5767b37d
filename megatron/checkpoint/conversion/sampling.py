# SPDX-License-Identifier: Apache-2.0
"""A model of some layers of a larger one, on both sides, so that logits can be compared where the whole does not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint.conversion.model import Described
from megatron.checkpoint.conversion.reward import written_family
from megatron.checkpoint.conversion.safetensors_file import Planned, write_shards
from megatron.checkpoint.conversion.tensor_manifest import content_of
from megatron.checkpoint.conversion.weights import Whole
from megatron.checkpoint.formats.hf_files import CONFIG, SHARD_BYTES, read_config, read_state, write_json
from megatron.checkpoint.formats.state import LazyState
from megatron.checkpoint.mapping.config_rows import FieldPair
from megatron.checkpoint.mapping.rows import Family, usual_names
from megatron.model.spec import ModelSpec


def chosen_layers(count: int) -> list[int]:
    """The first, the last and one between.

    >>> chosen_layers(48), chosen_layers(2)
    ([0, 24, 47], [0, 1])
    """
    return sorted({0, count // 2, count - 1})


def of_layers(model: Described, layers: Sequence[int]) -> Described:
    """The model that has these layers only."""
    spec = replace(model.spec, blocks=tuple(model.spec.blocks[layer] for layer in layers))
    return Described(model.keys, spec)


def weights_of_layers(weights: Whole, model: Described, layers: Sequence[int]) -> LazyState:
    """Its weights, under the names that they have in the smaller model."""
    total, few = model.spec.num_layers, len(layers)
    slots = {0: 0, few + 3: total + 3, few + 4: total + 4, **{number + 2: layer + 2 for number, layer in enumerate(layers)}}

    def old(name: str) -> str:
        slot, _, rest = name.partition(".")
        return f"{slots[int(slot)]}.{rest}"

    return LazyState({name: partial(weights.__getitem__, old(name)) for name in of_layers(model, layers).shapes})


def write_layers(hf: Path, target: Path, spec: ModelSpec, layers: Sequence[int]) -> None:
    """A Hugging Face directory of these layers of another one. spec: of the whole model"""
    config = read_config(hf)
    family = written_family(config)
    names = dict(_names(family, spec, layers))
    stored = usual_names(family, read_state(hf), set(names.values()))
    target.mkdir()
    write_json(target / CONFIG, _config_of_layers(config, family, spec.num_layers, layers))
    plan = [Planned(new, tuple(stored[old].shape), stored[old].dtype) for new, old in names.items()]
    tensors = ((new, stored[old]) for new, old in names.items())
    write_shards(target, plan, tensors, _bytes_of, limit=SHARD_BYTES)


def _bytes_of(_: str, tensor: Tensor) -> memoryview:
    return content_of(tensor)


def _names(family: Family, spec: ModelSpec, layers: Sequence[int]) -> Iterator[tuple[str, str]]:
    """(name in the smaller model, name in the larger one)"""
    for row in family.rows:
        if row.when is not None and not row.when(spec):
            continue
        for name in (row.theirs,) if isinstance(row.theirs, str) else row.theirs:
            for number, layer in enumerate(layers) if row.per_layer else [(0, 0)]:
                yield name.format(layer=number), name.format(layer=layer)


def _config_of_layers(config: Mapping[str, Any], family: Family, total: int, layers: Sequence[int]) -> dict[str, Any]:
    """Fields that list something for every layer keep the entries of these."""
    count = next(row.hf for row in family.config if isinstance(row, FieldPair) and row.neox == "num_layers")
    fields = json.loads(json.dumps(dict(config)))
    lists = {key: value for key, value in fields.items() if isinstance(value, list) and len(value) == total > 1}
    return {**fields, **{key: [value[layer] for layer in layers] for key, value in lists.items()}, count: len(layers)}
