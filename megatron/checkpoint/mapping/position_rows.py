# SPDX-License-Identifier: Apache-2.0
"""Rows of configuration fields on positions and windows, which may differ from layer to layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.checkpoint.mapping.config_rows import Config, inexpressible
from megatron.errors import ConfigError
from megatron.model.spec import ModelSpec, RotarySpec

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Window:
    """Sliding window. Theirs counts the tokens seen, ours those behind the current one. default: what its absence means there"""

    hf: str = "sliding_window"
    default: int | None = None

    def to_neox(self, hf: Config) -> dict[str, Any]:
        """Our key, one less."""
        window = hf.get(self.hf, self.default)
        return {} if window is None else {"sliding_window_width": window - 1}

    def to_hf(self, neox: Config, spec: ModelSpec) -> dict[str, Any]:
        """Their field, one more; one width for all layers."""
        windows = {block.attention.window for block in spec.blocks}
        if len(windows) > 1:
            what = "this architecture has one window for all layers"
            raise ConfigError(what, where="sliding_window_pattern", fix="choose another architecture")
        (window,) = windows
        return {self.hf: None if window is None else window + 1}


@dataclass(frozen=True)
class LayerWindows:
    """One width, and a type for each layer. Theirs counts the tokens seen, ours those behind the current one.

    types:  what an absent `layer_types` means there
    switch: name of their field without which the width does not count; None = there is none
    """

    types: Callable[[Config], Sequence[str]]
    switch: str | None = None
    width: int = 4096

    def to_neox(self, hf: Config) -> dict[str, Any]:
        """One of our two keys, or none."""
        types = list(hf.get("layer_types") or self.types(hf))
        if unknown := sorted(set(types) - {FULL, SLIDING}):
            raise ConfigError(f"layer type '{unknown[0]}' is not supported", where="config.json: layer_types", fix=f"{FULL} or {SLIDING}")
        if SLIDING not in types:
            return {}
        seen = hf.get("sliding_window", self.width) if self.switch is None or hf.get(self.switch, False) else None
        if seen is None:
            what = "there are sliding layers, but no sliding_window"
            fix = f"set sliding_window{f' and {self.switch}' if self.switch else ''}"
            raise ConfigError(what, where="config.json: layer_types", fix=fix)
        if FULL not in types:
            return {"sliding_window_width": seen - 1}
        return {"sliding_window_pattern": shortest_period([seen - 1 if kind == SLIDING else None for kind in types])}

    def to_hf(self, neox: Config, spec: ModelSpec) -> dict[str, Any]:
        """Their fields."""
        windows = [block.attention.window for block in spec.blocks]
        widths = {window for window in windows if window is not None}
        if len(widths) > 1:
            what = f"this architecture has one width of windows, not {', '.join(map(str, sorted(widths)))}"
            raise ConfigError(what, where="sliding_window_pattern", fix="choose another architecture")
        types = [FULL if window is None else SLIDING for window in windows]
        fields: dict[str, Any] = {"layer_types": types, "sliding_window": max(widths) + 1 if widths else self.width}
        if self.switch is not None:
            # Readers that know no layer_types take the last layers to be the sliding ones.
            fields |= {self.switch: bool(widths), "max_window_layers": types.count(FULL)}
        return fields


def shortest_period(values: list[int | None]) -> list[int | None]:
    """The shortest start of a list that, repeated, gives it.

    >>> shortest_period([7, 7, None, 7, 7, None, 7])
    [7, 7, None]
    """
    lengths = range(1, len(values) + 1)
    return next(values[:length] for length in lengths if all(values[i] == values[i % length] for i in range(len(values))))


@dataclass(frozen=True)
class Rope:
    """Rotary base, fraction and scaling; their fields moved into `rope_parameters` in transformers 5.

    base, fraction: names of the fields before that; fraction None = the whole head
    kinds:          of scaling that this architecture has
    layers:         those that are scaled, as the `rope_scaling_layers` key says it
    kind_field:     name under which the kind is written
    """

    base: str = "rope_theta"
    fraction: str | None = None
    kinds: tuple[str, ...] = ("linear", "yarn", "llama3")
    layers: str = "all"
    kind_field: str = "rope_type"

    def to_neox(self, hf: Config) -> dict[str, Any]:
        """Our keys."""
        parameters = self._parameters(hf)
        base = parameters.pop("rope_theta", None) or hf.get(self.base) or 10000.0
        fraction = parameters.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or 1.0
        if self.fraction is not None:
            fraction = hf.get(self.fraction) or fraction
        if self.fraction is None and fraction != 1.0:
            raise ConfigError(f"partial_rotary_factor {fraction} is not supported here", where="config.json: partial_rotary_factor")
        base = int(base) if float(base).is_integer() else base
        keys: dict[str, Any] = {"pos_emb": "rotary", "rotary_pct": fraction, "rotary_emb_base": base}
        scaling = self._scaling(dict(hf.get("rope_scaling") or parameters), hf)
        if scaling is not None:
            keys["rope_scaling"] = scaling
            keys |= {} if self.layers == "all" else {"rope_scaling_layers": self.layers}
        return keys

    def _parameters(self, hf: Config) -> dict[str, Any]:
        """`rope_parameters`, of full layers where each type of layers has its own: sliding ones may differ in being plain."""
        found = dict(hf.get("rope_parameters") or {})
        if not any(isinstance(value, dict) for value in found.values()):
            return found
        full, sliding = dict(found.get(FULL) or {}), dict(found.get(SLIDING) or {})
        plain = sliding.get("rope_type", "default") == "default" and sliding.get("rope_theta") == full.get("rope_theta")
        if not full or not (sliding in ({}, full) if self.layers == "all" else plain):
            what = f"rotary positions that differ so by type of layer are not supported: {found}"
            raise ConfigError(what, where="config.json: rope_parameters")
        return full

    def _scaling(self, found: dict[str, Any], hf: Config) -> dict[str, Any] | None:
        """Our form of their scaling."""
        scaling = {
            name: value for name, value in found.items() if value is not None and name not in ("rope_theta", "partial_rotary_factor")
        }
        kinds = [scaling.pop(name, None) for name in ("rope_type", "type")]
        kind = kinds[0] or kinds[1] or "default"
        if kind == "default":
            return None
        if kind not in self.kinds:
            what = f"rope_scaling of type '{kind}' is not supported"
            raise ConfigError(what, where="config.json: rope_scaling", fix=f"one of {', '.join(self.kinds)}")
        if kind == "yarn":
            scaling.setdefault("original_max_position_embeddings", hf.get("max_position_embeddings"))
            if not scaling.pop("truncate", True):
                raise ConfigError("yarn without truncation is not supported", where="config.json: rope_scaling.truncate")
            over, under = scaling.pop("mscale", None), scaling.pop("mscale_all_dim", None)
            if over and under and "attention_factor" not in scaling:
                scaling["attention_factor"] = temperature(scaling["factor"], over) / temperature(scaling["factor"], under)
        return {"rope_type": kind, **scaling}

    def to_hf(self, neox: Config, spec: ModelSpec) -> dict[str, Any]:
        """Their fields, under the names that both versions read."""
        rotary = spec.blocks[0].attention.rotary
        if rotary is None:
            raise inexpressible("pos_emb", neox.get("pos_emb"), "it needs rotary positions")
        whole = rotary.dim == spec.blocks[0].attention.head_dim
        if self.fraction is None and not whole:
            raise ConfigError("this architecture rotates whole heads", where="rotary_pct", fix="choose another architecture")
        fields: dict[str, Any] = {self.base: rotary.base, "rope_scaling": self._rope_scaling(neox, spec)}
        if self.fraction is not None:
            fields[self.fraction] = neox.get("rotary_pct", 1.0)
        return fields

    def _rope_scaling(self, neox: Config, spec: ModelSpec) -> dict[str, Any] | None:
        """Their `rope_scaling`, when just those layers are scaled that would be there."""
        pairs = [(block.attention.rotary, block.attention.window) for block in spec.blocks]
        scaled = [isinstance(rotary, RotarySpec) and rotary.scaling is not None for rotary, _ in pairs]
        if not any(scaled):
            return None
        if scaled != [self.layers == "all" or window is None for _, window in pairs]:
            what = f"this architecture scales the rotary positions of {self.layers} layers"
            raise ConfigError(what, where="rope_scaling_layers", fix=f"it needs {self.layers}; choose another architecture")
        given = dict(neox["rope_scaling"])
        kinds = [given.pop(name, None) for name in ("rope_type", "type")]
        kind = kinds[0] or kinds[1]
        if kind not in self.kinds:
            what = f"this architecture has no '{kind}' scaling"
            raise ConfigError(what, where="rope_scaling", fix=f"one of {', '.join(self.kinds)}; choose another architecture")
        return {self.kind_field: kind, **given, "factor": float(given["factor"])}


def temperature(factor: float, scale: float = 1.0) -> float:
    """YaRN's factor on queries and keys (arXiv 2309.00071, eq. 22), with a scale on its logarithm."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
