# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs -> the objective of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron.errors import ConfigError
from megatron.log import get_logger
from megatron.objectives.base import Objective
from megatron.objectives.registry import objective_class

if TYPE_CHECKING:
    from megatron.neox_arguments import NeoXArgs

log = get_logger(__name__)


def build_objective(args: NeoXArgs, *, eod: int) -> Objective:
    """The objective asked for by `train_impl`.

    eod: the tokenizer's end-of-document id
    """
    kind = objective_class(args.objective.train_impl)
    for key in ("ga_dataset", "gd_retain_dataset"):
        if getattr(args.objective, key) is not None:
            raise ConfigError("gradient ascent and gradient difference are not built yet", where=key, fix=f"remove {key}")
    isolated = args.attention.attention_over_documents == "isolated"
    log.info(f"documents packed into one row: {'isolated from' if isolated else 'joined with'} each other")
    return kind(
        eod=eod,
        use_labels=bool(args.data.train_label_data_paths),
        isolated=isolated,
        eod_mask_loss=bool(args.data.eod_mask_loss),
    )
