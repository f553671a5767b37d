# SPDX-License-Identifier: Apache-2.0
"""The whole model on one page: its layers in order, each with the number it has in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from megatron.model.block import TransformerBlock
from megatron.model.embedding import Embedding
from megatron.model.head import FinalNorm, LMHead, ValueHead, tied_logits
from megatron.model.init import Initialiser
from megatron.model.slots import share_weights
from megatron.model.spec import HeadKind, ModelSpec, Positions
from megatron.mpu.context import ContextPlan
from megatron.mpu.groups import Groups


@dataclass(frozen=True)
class Slot:
    """One place in the model.

    number: FORMAT: layer number in a NeoX checkpoint
    layer:  class of the module; None = a gap, a number without a module
    spec:   its first argument
    tie:    slots with one key share one module
    placed: whether what it does depends on the place of a row in the sequence
    head:   for a tied last slot: what runs on the shared module in place of its own forward
    """

    number: int
    layer: type[nn.Module] | None
    spec: Any = None
    tie: str | None = None
    placed: bool = False
    head: Callable[..., Any] | None = None

    @classmethod
    def gap(cls, number: int) -> Slot:
        """A number that no module bears."""
        return cls(number, None)


def layer_plan(spec: ModelSpec) -> list[Slot]:
    """Every slot of the model in order; slot numbers are 0 .. num_layers + 4 without a hole."""
    count = spec.num_layers
    if spec.head.kind is HeadKind.VALUE:
        # FORMAT: a reward model has no final_linear, also where the embeddings of its base are tied.
        first, last = Slot(0, Embedding, spec.embedding, placed=True), Slot(count + 4, ValueHead, spec.head)
    elif spec.tied:
        first = Slot(0, Embedding, spec.embedding, tie="embed", placed=True)
        # On a stage of its own the head needs no positions; where both are on one stage, they are the first slot's module.
        table = replace(spec.embedding, positions=Positions.NONE)
        last = Slot(count + 4, Embedding, table, tie="embed", head=partial(tied_logits, spec=spec.head))
    else:
        first = Slot(0, Embedding, spec.embedding, placed=True)
        last = Slot(count + 4, LMHead, spec.head)
    blocks = [Slot(2 + index, TransformerBlock, block, placed=True) for index, block in enumerate(spec.blocks)]
    # FORMAT: slots 1 and count + 2 were transposes in NeoX; their numbers stay empty.
    return [first, Slot.gap(1), *blocks, Slot.gap(count + 2), Slot(count + 3, FinalNorm, spec.final_norm), last]


@dataclass(frozen=True, kw_only=True)
class Builder:
    """Turns slots into modules with weights.

    groups: over which weights are split
    context: how sequences are spread over ranks
    device: where; torch.device("meta") leaves weights unmade
    dtype:  of the parameters; None = float32, or what an enclosing context decides
    """

    initialiser: Initialiser
    groups: Groups
    context: ContextPlan = ContextPlan()
    device: torch.device | None = None
    dtype: torch.dtype | None = None

    def build(self, slot: Slot) -> nn.Module:
        """The module of a slot that is not a gap."""
        assert slot.layer is not None
        place = {"context": self.context} if slot.placed else {}
        with nullcontext() if self.device is None else self.device:
            module = slot.layer(slot.spec, tp=self.groups.tp, **place)
        if self.device is None or self.device.type != "meta":
            self.initialiser(module, str(slot.number), self.groups)
        return module if self.dtype is None else module.to(self.dtype)


def share_between(modules: Iterable[nn.Module]) -> None:
    """Let the blocks among consecutive layers use what all mixers, or all feed-forwards, of one class share."""
    blocks = [module for module in modules if isinstance(module, TransformerBlock)]
    share_weights([block.mixer for block in blocks])
    share_weights([block.ffn for block in blocks])
