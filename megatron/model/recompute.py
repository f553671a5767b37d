# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing: what a forward pass keeps of its blocks, and what the backward pass computes again.

Embedding and head are never recomputed. Recomputation draws the same dropout masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from megatron.model.attention.inputs import PackedSequences
from megatron.model.block import TransformerBlock
from megatron.model.layer_state import LayerState
from megatron.mpu.comm import all_gather
from megatron.mpu.groups import Group


class Granularity(str, Enum):
    """What is recomputed; values are the `checkpoint_granularity` key's."""

    FULL = "full"  # everything between the first and the last of a span (Chen et al., arXiv 1604.06174)
    SELECTIVE = "selective"  # what is cheap; weight products, fused attention and sums stay (Korthikanti et al., arXiv 2205.05198, sec. 5)


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """How blocks are recomputed in the backward pass.

    num_layers:  blocks per span; each span keeps its input [b, s, h]
    granularity: what a span keeps beside that
    on_host:     span inputs wait in host memory (pinned, for CUDA)
    partitioned: each rank of tp keeps its part of a span's input (arXiv 1910.02054, sec. 6.1)
    """

    num_layers: int = 1
    granularity: Granularity = Granularity.FULL
    on_host: bool = False
    partitioned: bool = False


def run_blocks(blocks: Sequence[TransformerBlock], stream: LayerState, recompute: Recompute | None, *, tp: Group) -> LayerState:
    """The stream through consecutive blocks; recompute None = keep all activations. Without gradients nothing is kept."""
    # Where documents lie is found once, not once per block: finding it makes a GPU's host wait.
    isolated = any(block.mixer.isolated for block in blocks)
    fixed = any(block.compiled for block in blocks)
    segment_ids = PackedSequences.of(stream.segment_ids, fixed=fixed) if isolated else stream.segment_ids
    hidden, aux = stream.hidden, stream.aux
    if recompute is None or not torch.is_grad_enabled():
        hidden, aux = run_span(blocks, hidden, segment_ids, aux)
        return LayerState(hidden, stream.segment_ids, aux)
    selective = recompute.granularity is Granularity.SELECTIVE
    contexts = partial(create_selective_checkpoint_contexts, keeps) if selective else noop_context_fn
    for start in range(0, len(blocks), recompute.num_layers):
        span = blocks[start : start + recompute.num_layers]
        with moved_inputs(recompute, tp):
            hidden, aux = checkpoint(run_span, span, hidden, segment_ids, aux, use_reentrant=False, context_fn=contexts)
    return LayerState(hidden, stream.segment_ids, aux)


def run_span(
    blocks: Sequence[TransformerBlock], hidden: Tensor, segment_ids: Tensor | PackedSequences | None, aux: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """hidden [b, s, h] and aux [] through consecutive blocks."""
    for block in blocks:
        hidden, _, aux = block((hidden, segment_ids, aux))
    return hidden, aux


# ---- what a selective span keeps ---------------------------------------------------------------------------------

# Batched products are not among them: where attention is not fused they make its scores, whose size grows with s * s.
_PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::_scaled_mm", "aten::_grouped_mm"})
_ATTENTION = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
    }
)
# Sums over ranks, so none is made twice. What is gathered is gathered again: kept, every rank would hold whole sequences (ibid.).
_SUMS = frozenset({"_c10d_functional::all_reduce", "_c10d_functional::reduce_scatter_tensor"})


def keeps(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """torch's question for every operation of a selective span: whether its result is kept."""
    name = op.name().partition(".")[0]
    if name in _PRODUCTS or name in _SUMS or (name in _ATTENTION and not draws(op, args, kwargs)):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def draws(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an attention kernel takes random numbers for its dropout.

    Were its result kept, recomputation would skip that draw, and every later mask of the span would be another one.
    """
    given = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs
    return bool(given.get("dropout_p", 0.0) > 0.0)


# ---- where the inputs of spans are kept --------------------------------------------------------------------------


class Offloaded(NamedTuple):
    """An offloaded tensor: data is all of it, or this rank's part of its elements in order (padded to equal parts)."""

    data: Tensor
    shape: torch.Size
    device: torch.device


def moved_inputs(recompute: Recompute, tp: Group) -> AbstractContextManager[Any]:
    """Within, what autograd saves is offloaded as asked. `checkpoint` saves nothing but the inputs of its span."""
    # Where the sequence is spread over tp, what comes in is this rank's part already.
    sliced = recompute.partitioned and tp.size > 1 and not tp.sequence
    if not (sliced or recompute.on_host):
        return nullcontext()
    group = tp if sliced else Group.single()
    return saved_tensors_hooks(partial(offload, group=group, on_host=recompute.on_host), partial(reload, group=group))


def offload(x: Tensor, *, group: Group, on_host: bool) -> Tensor | Offloaded:
    """x, equal on all ranks of the group -> what this rank keeps. Document numbers and scalars stay as they are."""
    if not x.is_floating_point() or x.dim() == 0:
        return x
    data = x.detach()
    if group.size > 1:
        size = -(-data.numel() // group.size)
        flat = F.pad(data.reshape(-1), (0, size * group.size - data.numel()))
        # A view would keep the whole alive.
        data = flat[group.rank * size : (group.rank + 1) * size].clone()
    if on_host and data.device.type != "cpu":
        host = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.device.type == "cuda")
        data = host.copy_(data, non_blocking=True)
    return Offloaded(data, x.shape, x.device)


def reload(kept: Tensor | Offloaded, *, group: Group) -> Tensor:
    """What `offload` was given; a collective call of the group."""
    if isinstance(kept, Tensor):
        return kept
    data = kept.data.to(kept.device, non_blocking=True)
    return all_gather(data, group, 0)[: prod(kept.shape)].view(kept.shape) if group.size > 1 else data
