# SPDX-License-Identifier: Apache-2.0
"""Building a model whose parameters ZeRO-3 partitions as they are made, so that no rank ever holds all of them. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed

from megatron.engine.deepspeed_mpu import grid_of
from megatron.model.init import Gather
from megatron.mpu.groups import Groups


class Partitioning:
    """How a model is built under a DeepSpeed configuration: partitioned as it grows with ZeRO-3, else whole.

    config: DeepSpeed's, as a dict; it also says of what precision the parameters are
    """

    def __init__(self, config: Mapping[str, Any], groups: Groups) -> None:
        self.active = int(config["zero_optimization"].get("stage", 0)) == 3
        self._config = dict(config)
        self._groups = groups

    @property
    def gather(self) -> Gather | None:
        """Makes parameters whole while they are written to; every replica writes the same. None = they are whole."""
        return whole_while_written if self.active else None

    def building(self) -> AbstractContextManager[Any]:
        """The context to build the model in."""
        if not self.active:
            return nullcontext()
        context: AbstractContextManager[Any] = deepspeed.zero.Init(
            config_dict_or_path=self._config,
            data_parallel_group=self._groups.replicas.handle,
            mpu=grid_of(self._groups),
        )
        return context


def whole_while_written(parameters: Any) -> AbstractContextManager[Any]:
    """Partitioned parameters whole within; what was written is kept."""
    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
    return context
