# SPDX-License-Identifier: Apache-2.0
"""Which module serves which spec in a block's two slots, and what is asked of all slots: checks, parameter counts, operations (FLOPs)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from megatron.errors import ConfigError
from megatron.model.attention.layer import SelfAttention
from megatron.model.layer_state import BlockSlot, FeedForward, Mixer
from megatron.model.mlp import MLP
from megatron.model.spec import AttentionSpec, BlockSpec, EmbeddingSpec, HeadKind, MLPSpec, ModelSpec, Positions, Residual
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


def parameter_count(spec: ModelSpec) -> int:
    """Trainable parameters of the whole model; a tied head counts once."""
    shared = {kind: kind.shared_parameter_count(slot) for kind, slot in reversed(list(all_slots(spec)))}
    count: int = embedding_parameters(spec.embedding) + spec.final_norm.parameter_count
    count += sum(map(block_parameters, spec.blocks)) + sum(shared.values())
    return count if spec.tied and spec.head.kind is HeadKind.VOCABULARY else count + spec.head.parameter_count


def embedding_parameters(spec: EmbeddingSpec) -> int:
    """Token table and, where learned, the position table."""
    rows = spec.vocab_size + (spec.max_positions + spec.position_offset if spec.positions is Positions.LEARNED else 0)
    return rows * spec.hidden_size


def block_parameters(spec: BlockSpec) -> int:
    """One block without what all blocks share."""
    norms = 1 if spec.residual is Residual.PARALLEL_TIED else 2
    return norms * spec.norm.parameter_count + sum(kind.parameter_count(slot) for kind, slot in slots_of(spec))


def reported_flops_per_step(spec: ModelSpec, *, batch: int, recompute: bool) -> float:
    """The number behind the progress line's `approx flops`: FORMAT, NeoX's formula, over the whole global batch of `batch` rows.

    24 c B S L h^2 (1 + S / 6h + V / 16Lh) with c = 4 where activations are recomputed, else 3 (Narayanan et al., arXiv 2104.04473,
    sec. 5.1). It does not count grouped heads, gated widths, windows and causal halving; `matmul_flops_per_token` does.
    """
    s, h, v, layers = spec.seq_length, spec.hidden_size, spec.vocab_size, spec.num_layers
    passes = 4 if recompute else 3
    return 24.0 * passes * batch * s * layers * h**2 * (1.0 + s / (6.0 * h) + v / (16.0 * layers * h))


def matmul_flops_per_token(spec: ModelSpec, *, seq_length: int | None = None, recompute: bool = False) -> float:
    """Floating-point operations that training on one token needs in matrix products, forward and backward.

    Counts grouped heads, gated widths, the causal half of attention and its windows. recompute: with a second forward of the blocks.
    """
    length = spec.seq_length if seq_length is None else seq_length
    blocks = sum(kind.forward_flops(slot, length) for kind, slot in all_slots(spec))
    return (4.0 if recompute else 3.0) * blocks + 3.0 * 2.0 * spec.head.parameter_count
