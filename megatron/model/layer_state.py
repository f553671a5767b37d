# SPDX-License-Identifier: Apache-2.0
"""What flows from layer to layer, and the contract of the two slots of a block: its mixer and its feed-forward.

A new slot is a frozen spec with `hidden_size`, a class that inherits Mixer or FeedForward, and one line in `model/slots.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from megatron.errors import ConfigError
from megatron.mpu.context import ContextPlan
from megatron.mpu.groups import Groups

if TYPE_CHECKING:
    from megatron.model.cache import LayerCache


class LayerState(NamedTuple):
    """What a layer takes and gives. A tuple, so that the pipeline can send it.

    hidden      [b, s, h] activations (the first layer takes token ids [b, s] int64 in its place)
    segment_ids [b, s] int32 document number within the row; attention never crosses a change. All zero when documents are joined.
    aux         [] float32, the sum of what the layers so far add to the loss (balance losses); None = no layer has added anything

    A rank may have a part of the sequence's hidden states (sequence and context parallelism); segment_ids are always of whole rows.
    """

    hidden: Tensor
    segment_ids: Tensor
    aux: Tensor | None = None


SlotOutput = Tensor | tuple[Tensor, Tensor]
"""hidden [b, s, h], or (hidden, what is added to the loss, a float32 scalar that is equal on all ranks of tp)."""


class BlockSlot(nn.Module):
    """What mixers and feed-forwards have in common.

    `__init__(spec, *, tp, defer_reduce=False)`; a mixer also takes `context`. With defer_reduce the output is this rank's share of the
    sum over tp. Initial values and sharding are said by `initial_values()` (mpu/roles.py) and `sharding()` (mpu/sharding.py) of the
    module or of its parts.
    adds_aux: forward gives (hidden, aux)
    """

    adds_aux: ClassVar[bool] = False

    @staticmethod
    def parameter_count(spec: Any) -> int:
        """Parameters of a slot of this spec over all ranks, without those that all layers share."""
        raise NotImplementedError

    @staticmethod
    def shared_parameter_count(spec: Any) -> int:
        """Parameters that all layers of this class share."""
        return 0

    @staticmethod
    def forward_flops(spec: Any, length: int) -> float:
        """Floating-point operations of the matrix products of one token's forward pass, in rows of `length` tokens."""
        raise NotImplementedError

    @staticmethod
    def check(spec: Any, *, stages: int) -> None:
        """Raise ConfigError for a spec that cannot be run over this many pipeline stages."""

    def share(self, first: Any) -> None:
        """Use what all layers of this class share from the first of them."""


class Mixer(BlockSlot):
    """The slot that lets tokens see each other: forward(hidden, segment_ids, cache) -> SlotOutput.

    `isolated` of the module says whether it looks at segment_ids; then PackedSequences may come in their place.
    """

    isolated: bool = False

    @staticmethod
    def context_plan(spec: Any, groups: Groups) -> ContextPlan | None:
        """How this mixer needs sequences to be spread over the context group; None = it works with any plan."""
        if groups.cp.size > 1:
            raise ConfigError(f"{type(spec).__name__} needs whole rows", where="context_parallel_size", fix="set context_parallel_size: 1")
        return None

    def allocate_cache(self, rows: int, max_len: int, dtype: torch.dtype, device: torch.device | str) -> LayerCache:
        """An empty cache for decoding `rows` rows of up to `max_len` tokens."""
        raise NotImplementedError

    def forward(self, hidden: Tensor, segment_ids: Any = None, cache: Any = None) -> SlotOutput:
        """hidden [b, s, h], segment_ids [b, s] of whole rows, or PackedSequences -> [b, s, h].

        A cache has the tokens before and takes these.
        """
        raise NotImplementedError


class FeedForward(BlockSlot):
    """The slot that works on each token by itself: forward(hidden) -> SlotOutput."""

    def forward(self, hidden: Tensor) -> SlotOutput:
        """hidden [b, s, h] -> [b, s, h]."""
        raise NotImplementedError
