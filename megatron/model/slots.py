# SPDX-License-Identifier: Apache-2.0
"""The table of what can stand in a block's slots, and what the plan asks all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from megatron.errors import ConfigError
from megatron.model.attention.layer import SelfAttention
from megatron.model.layer_state import BlockSlot, FeedForward, Mixer
from megatron.model.mlp import MLP
from megatron.model.spec import AttentionSpec, BlockSpec, MLPSpec, ModelSpec
from megatron.mpu.context import ContextPlan
from megatron.mpu.groups import Groups

T = TypeVar("T")

MIXERS: dict[type, type[Mixer]] = {AttentionSpec: SelfAttention}
FEED_FORWARDS: dict[type, type[FeedForward]] = {MLPSpec: MLP}


def mixer_class(spec: Any) -> type[Mixer]:
    """The module class of a mixer's spec. Raises ConfigError for a spec that is not in the table."""
    return _found(MIXERS.get(type(spec)), spec, "MIXERS")


def ffn_class(spec: Any) -> type[FeedForward]:
    """The module class of a feed-forward's spec. Raises ConfigError for a spec that is not in the table."""
    return _found(FEED_FORWARDS.get(type(spec)), spec, "FEED_FORWARDS")


def _found(kind: type[T] | None, spec: Any, table: str) -> type[T]:
    if kind is None:
        raise ConfigError(f"no module is known for {type(spec).__name__}", where="model/slots.py", fix=f"add it to {table}")
    return kind


def slots_of(block: BlockSpec) -> tuple[tuple[type[BlockSlot], Any], tuple[type[BlockSlot], Any]]:
    """(class, spec) of a block's mixer and feed-forward."""
    return (mixer_class(block.mixer), block.mixer), (ffn_class(block.ffn), block.ffn)


def all_slots(spec: ModelSpec) -> Iterator[tuple[type[BlockSlot], Any]]:
    """(class, spec) of every slot of the stack, in order."""
    for block in spec.blocks:
        yield from slots_of(block)


def adds_aux(spec: ModelSpec) -> bool:
    """Whether any layer adds to the loss."""
    return any(kind.adds_aux for kind, _ in all_slots(spec))


def context_plan(spec: ModelSpec, groups: Groups) -> ContextPlan:
    """How sequences are spread over the context group: one plan for all layers.

    Raises ConfigError where a layer cannot share sequences, or two need different plans.
    """
    wanted = [mixer_class(block.mixer).context_plan(block.mixer, groups) for block in spec.blocks]
    plans = {plan.kind: plan for plan in wanted if plan is not None}
    if len(plans) > 1 and groups.cp.size > 1:
        kinds = " and ".join(sorted(kind.value for kind in plans))
        raise ConfigError(f"layers need {kinds} attention at once", where="context_parallel_size", fix="set context_parallel_size: 1")
    return next(iter(plans.values()), ContextPlan(groups.cp))


def check_slots(spec: ModelSpec, *, stages: int) -> None:
    """Raise the ConfigError of the first slot that cannot be run over this many pipeline stages."""
    for kind, slot in all_slots(spec):
        kind.check(slot, stages=stages)


def share_weights(slots: list[BlockSlot]) -> None:
    """Let all slots of one class use what they share from the first one."""
    first: dict[type, BlockSlot] = {}
    for slot in slots:
        if first.setdefault(type(slot), slot) is not slot:
            slot.share(first[type(slot)])
