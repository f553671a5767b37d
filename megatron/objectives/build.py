# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs -> the objective of a run: which class serves which `train_impl`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from megatron.errors import ConfigError
from megatron.log import get_logger
from megatron.neox_arguments.unfinished import refuse_value
from megatron.objectives.base import Objective
from megatron.objectives.language_model import LanguageModel

if TYPE_CHECKING:
    from megatron.neox_arguments import NeoXArgs

log = get_logger(__name__)

NAMES: Mapping[str, type[Objective]] = MappingProxyType({"normal": LanguageModel})


def objective_class(train_impl: str) -> type[Objective]:
    """The class of a `train_impl`, or a ConfigError that lists what there is."""
    found = NAMES.get(train_impl)
    if found is not None:
        return found
    refuse_value("train_impl", train_impl)
    raise ConfigError(f"train_impl {train_impl!r} is unknown", where="train_impl", fix=f"use one of: {', '.join(NAMES)}")


def build_objective(args: NeoXArgs, *, eod: int) -> Objective:
    """The objective asked for by `train_impl`.

    eod: the tokenizer's end-of-document id
    """
    kind = objective_class(args.objective.train_impl)
    for key in ("ga_dataset", "gd_retain_dataset"):
        refuse_value(key, getattr(args.objective, key))
    isolated = args.attention.attention_over_documents == "isolated"
    log.info(f"documents packed into one row: {'isolated from' if isolated else 'joined with'} each other")
    return kind.from_args(args, eod=eod)
