# SPDX-License-Identifier: Apache-2.0
"""Which class serves which `train_impl`. Knows no configuration."""

from __future__ import annotations

from types import MappingProxyType

from megatron.errors import ConfigError
from megatron.objectives.language_model import LanguageModel

NAMES = MappingProxyType({"normal": LanguageModel})
PLANNED = ("dpo", "rm", "kto", "reinforce")


def objective_class(train_impl: str) -> type[LanguageModel]:
    """The class of a `train_impl`, or a ConfigError that lists what there is."""
    found = NAMES.get(train_impl)
    if found is not None:
        return found
    state = "not built yet" if train_impl in PLANNED else "unknown"
    raise ConfigError(f"train_impl {train_impl!r} is {state}", where="train_impl", fix=f"use one of: {', '.join(NAMES)}")
