# SPDX-License-Identifier: Apache-2.0
"""Rows of configuration fields: our flat keys <-> a Hugging Face config, both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from megatron.errors import ConfigError
from megatron.model.spec import ModelSpec

Config = Mapping[str, Any]


class ConfigRow(Protocol):
    """One relation between the two configurations."""

    def to_neox(self, hf: Config) -> dict[str, Any]:
        """Our keys. Raises ConfigError for what our model cannot be."""

    def to_hf(self, neox: Config, spec: ModelSpec) -> dict[str, Any]:
        """Their fields. Raises ConfigError, naming the key, for what they cannot express."""


def inexpressible(key: str, value: Any, fix: str) -> ConfigError:
    """The error for a key of ours with a value that the other side's models cannot have."""
    return ConfigError(f"this architecture cannot express '{key}: {value}'", where=key, fix=fix)


@dataclass(frozen=True)
class FieldPair:
    """The same value under two names; `default` is what an absent field means there, `ours` what an absent key means here.

    also: further fields of theirs that must have the same value
    """

    neox: str
    hf: str
    default: Any = None
    ours: Any = None
    also: tuple[str, ...] = ()

    def to_neox(self, hf: Config) -> dict[str, Any]:
        """Our key."""
        value = hf.get(self.hf, self.default)
        for other in self.also:
            if hf.get(other, self.default) != value:
                what = f"{self.hf} and {other} differ, and '{self.neox}' stands for both"
                raise ConfigError(what, where=f"config.json: {other}", fix=f"set both to {value}")
        return {} if value is None else {self.neox: value}

    def to_hf(self, neox: Config, spec: ModelSpec) -> dict[str, Any]:
        """Their fields."""
        value = neox.get(self.neox)
        value = self.ours if value is None else value
        return dict.fromkeys((self.hf, *self.also), value)


@dataclass(frozen=True)
class Not:
    """Opposite truth values."""

    neox: str
    hf: str
    default: bool
    ours: bool

    def to_neox(self, hf: Config) -> dict[str, Any]:
        """Our key."""
        return {self.neox: not hf.get(self.hf, self.default)}

    def to_hf(self, neox: Config, spec: ModelSpec) -> dict[str, Any]:
        """Their field."""
        return {self.hf: not neox.get(self.neox, self.ours)}


@dataclass(frozen=True)
class Fixed:
    """Our key has one value in this family; `ours` is what an absent key means."""

    neox: str
    value: Any
    ours: Any

    def to_neox(self, hf: Config) -> dict[str, Any]:
        """That value, unless it is the default."""
        return {} if self.value == self.ours else {self.neox: self.value}

    def to_hf(self, neox: Config, spec: ModelSpec) -> dict[str, Any]:
        """Nothing, or a refusal."""
        value = neox.get(self.neox)
        value = self.ours if value is None else value
        if value != self.value:
            raise inexpressible(self.neox, value, f"it needs {self.value}; choose another architecture")
        return {}


@dataclass(frozen=True)
class Theirs:
    """Their field has one value that our model can be; `default` is what its absence means."""

    hf: str
    value: Any
    default: Any
    written: bool = False

    def to_neox(self, hf: Config) -> dict[str, Any]:
        """Nothing, or a refusal."""
        found = hf.get(self.hf, self.default)
        if found != self.value:
            where = f"config.json: {self.hf}"
            raise ConfigError(f"'{self.hf}: {found}' is not supported", where=where, fix=f"only {self.value} can be converted")
        return {}

    def to_hf(self, neox: Config, spec: ModelSpec) -> dict[str, Any]:
        """The field, where it is worth writing."""
        return {self.hf: self.value} if self.written else {}


@dataclass(frozen=True)
class Holds:
    """Something that must be so of our model; `neox` is the key to name when it is not."""

    neox: str
    test: Callable[[ModelSpec], bool]
    fix: str

    def to_neox(self, hf: Config) -> dict[str, Any]:
        """Nothing: their models are so."""
        return {}

    def to_hf(self, neox: Config, spec: ModelSpec) -> dict[str, Any]:
        """Nothing, or a refusal."""
        if not self.test(spec):
            raise inexpressible(self.neox, neox.get(self.neox), self.fix)
        return {}


@dataclass(frozen=True)
class Length:
    """Their position limit is our max_position_embeddings, and our seq_length until somebody sets another."""

    hf: str = "max_position_embeddings"

    def to_neox(self, hf: Config) -> dict[str, Any]:
        """Both keys."""
        return {"max_position_embeddings": hf[self.hf], "seq_length": hf[self.hf]}

    def to_hf(self, neox: Config, spec: ModelSpec) -> dict[str, Any]:
        """Their field."""
        return {self.hf: neox["max_position_embeddings"]}


@dataclass(frozen=True)
class Width:
    """The MLP's width. Ours goes out as the model has it, whatever convention the key was written in."""

    hf: str = "intermediate_size"

    def to_neox(self, hf: Config) -> dict[str, Any]:
        """An explicit literal width; an absent one means 4 h."""
        width = hf.get(self.hf)
        return {} if width is None else {"intermediate_size": width, "intermediate_size_convention": "literal"}

    def to_hf(self, neox: Config, spec: ModelSpec) -> dict[str, Any]:
        """Their field."""
        return {self.hf: spec.blocks[0].mlp.width}


@dataclass(frozen=True)
class Heads:
    """Head size. default: what an absent field means there; None = hidden_size / heads

    free: whether another size than that can be said there
    """

    hidden: str = "hidden_size"
    heads: str = "num_attention_heads"
    default: int | None = None
    free: bool = True

    def to_neox(self, hf: Config) -> dict[str, Any]:
        """Our key where the size does not follow from others, or a refusal."""
        size = hf.get("head_dim", self.default)
        if size is None or size * hf[self.heads] == hf[self.hidden]:
            return {}
        if not self.free:
            what = f"head_dim {size} is not {self.hidden} / {self.heads}"
            raise ConfigError(what, where="config.json: head_dim", fix="such a model cannot be converted")
        return {"head_dim": size}

    def to_hf(self, neox: Config, spec: ModelSpec) -> dict[str, Any]:
        """Their field, or a refusal."""
        attention = spec.blocks[0].attention
        if self.free:
            return {"head_dim": attention.head_dim}
        if attention.head_dim * attention.num_heads != spec.hidden_size:
            fix = "it needs hidden_size / num_attention_heads; choose another architecture"
            raise inexpressible("head_dim", attention.head_dim, fix)
        return {}


@dataclass(frozen=True)
class Act:
    """The activation. table: our name -> theirs; "gelu_tanh" stands for gelu with bias_gelu_fusion."""

    table: tuple[tuple[str, str], ...]
    hf: str = "hidden_act"

    def to_neox(self, hf: Config) -> dict[str, Any]:
        """Our keys."""
        name = hf.get(self.hf)
        for ours, theirs in self.table:
            if name == theirs:
                tanh = ours == "gelu_tanh"
                return {"activation": "gelu" if tanh else ours, "bias_gelu_fusion": tanh}
        known = ", ".join(theirs for _, theirs in self.table)
        raise ConfigError(f"activation '{name}' is not supported", where=f"config.json: {self.hf}", fix=f"one of {known}")

    def to_hf(self, neox: Config, spec: ModelSpec) -> dict[str, Any]:
        """Their field."""
        name = spec.blocks[0].mlp.activation
        for ours, theirs in self.table:
            if name == ours:
                return {self.hf: theirs}
        known = ", ".join(ours for ours, _ in self.table)
        raise inexpressible("activation", name, f"one of {known}")
