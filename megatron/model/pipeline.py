# SPDX-License-Identifier: Apache-2.0
"""The same plan as a DeepSpeed PipelineModule. The only file that knows DeepSpeed's pipeline module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import groupby
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron.deepspeed_private import count_micro_batch, stage_layers
from megatron.log import get_logger
from megatron.model.block import TransformerBlock
from megatron.model.init import Initialiser
from megatron.model.layer_state import LayerState
from megatron.model.recompute import Recompute, run_blocks
from megatron.model.slots import adds_aux, check_slots, context_plan
from megatron.model.spec import ModelSpec
from megatron.model.transformer import Builder, Slot, layer_plan, share_between
from megatron.mpu.groups import Group, Groups

log = get_logger(__name__)

TIED_WEIGHT = "word_embeddings.weight"


@dataclass(frozen=True, kw_only=True)
class PipelineChoices:
    """How the plan is cut and run.

    partition_method:  DeepSpeed's: type:REGEX on class names | parameters | uniform
    recompute:         how the backward pass gets the blocks' activations; None = the forward pass keeps them
    compile_blocks:    torch.compile each block
    """

    partition_method: str = "type:transformer|mlp"
    recompute: Recompute | None = None
    compile_blocks: bool = False


class SlotLayer(LayerSpec):  # type: ignore[misc]  # deepspeed is untyped
    """A slot that DeepSpeed builds on the stage that owns it, with its weights."""

    def __init__(self, slot: Slot, builder: Builder) -> None:
        super().__init__(slot.layer)
        self.slot = slot
        self.builder = builder

    def build(self, log: bool = False) -> nn.Module:
        """The module with initial weights; `log` is DeepSpeed's."""
        return self.builder.build(self.slot)


class TiedSlotLayer(TiedLayerSpec):  # type: ignore[misc]  # deepspeed is untyped
    """A slot that shares its module with another one, perhaps on another stage."""

    def __init__(self, slot: Slot, builder: Builder) -> None:
        run = None if slot.head is None else lambda module, stream: module(stream, head=slot.head)
        super().__init__(slot.tie, slot.layer, forward_fn=run, tied_weight_attr=TIED_WEIGHT)
        self.slot = slot
        self.builder = builder

    def build(self, log: bool = False) -> nn.Module:
        """The shared module with initial weights, drawn under the name of the first slot on every stage."""
        return self.builder.build(Slot(0, self.slot.layer, self.slot.spec, placed=True))


class Stages(PipelineModule):  # type: ignore[misc]  # deepspeed is untyped
    """DeepSpeed's module with another way to run a stage's layers: spans of recomputation count blocks, from the stage's first one.

    DeepSpeed counts every layer from the stage's beginning, so a span could reach into the head. `seed_layers` is not offered.
    adds_aux: layers add to the loss; then the sum so far travels inside the hidden states (`join_aux`)
    """

    def __init__(self, *, recompute: Recompute | None, tp: Group, adds_aux: bool, **deepspeeds: Any) -> None:
        super().__init__(**deepspeeds)
        self.recompute = recompute
        self.tp = tp
        self.adds_aux = adds_aux

    def forward(self, forward_input: Any) -> Any:
        """What the stage before sends (the first stage: the inputs of a micro batch) through all layers of this stage."""
        count_micro_batch(self)
        flow = LayerState(*forward_input)
        if self.adds_aux and self.stage_id > 0:
            hidden, aux = split_aux(flow.hidden)
            flow = LayerState(hidden, flow.segment_ids, aux)
        for are_blocks, layers in groupby(stage_layers(self), key=is_block):
            if are_blocks:
                flow = run_blocks(list(layers), flow, self.recompute, tp=self.tp)
                continue
            for layer in layers:
                flow = layer(flow)
        if not isinstance(flow, LayerState):  # what the head gave
            return flow
        return (join_aux(flow.hidden, flow.aux) if self.adds_aux else flow.hidden), flow.segment_ids


class _JoinAux(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, aux: Tensor) -> Tensor:
        return _with_bits(hidden, aux)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0][:, :-1], _bits(grads[0])


class _SplitAux(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor) -> tuple[Tensor, Tensor]:
        return joined[:, :-1].contiguous(), _bits(joined)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _with_bits(grads[0], grads[1])


def join_aux(hidden: Tensor, aux: Tensor | None) -> Tensor:
    """hidden [b, s, h] and aux [] float32 -> [b, s + 1, h], the bits of aux at the beginning of the first row's last position.

    DeepSpeed runs one backward pass for each tensor with a gradient that a stage sends; so there is one. No arithmetic is done on what
    is sent, nor on its gradient, which carries that of aux in the same way.
    """
    aux = torch.zeros((), dtype=torch.float32, device=hidden.device) if aux is None else aux
    out: Tensor = _JoinAux.apply(hidden, aux)
    return out


def split_aux(joined: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `join_aux`."""
    hidden, aux = _SplitAux.apply(joined)
    return hidden, aux


def _with_bits(x: Tensor, number: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], x.shape[1] + 1, x.shape[2])
    out[:, :-1] = x
    bits = number.detach().reshape(1).float().view(x.dtype)
    out[0, -1, : bits.numel()] = bits
    return out


def _bits(x: Tensor) -> Tensor:
    """The float32 number in x, []."""
    return x[0, -1, : 4 // x.element_size()].clone().view(torch.float32)[0]


def is_block(layer: Any) -> bool:
    """Whether a layer of a stage is one of the stack, whatever its mixer."""
    return isinstance(layer, TransformerBlock)


def topology_of(stages: int, data: int, tensor: int) -> PipeModelDataParallelTopology:
    """Ranks in order of pipe, data, model, the last varying fastest; checkpoint files are named by the model axis."""
    return PipeModelDataParallelTopology(num_pp=max(stages, 1), num_mp=max(tensor, 1), num_dp=max(data, 1))


def gap(stream: Any) -> Any:
    """A slot number without a module: the stream as it is. Having no state dict, it leaves no file in a checkpoint."""
    return stream


def layers_of(spec: ModelSpec, builder: Builder) -> list[Any]:
    """The plan as DeepSpeed wants it; the index in this list is the slot number."""

    def form(slot: Slot) -> Any:
        if slot.layer is None:
            return gap
        return SlotLayer(slot, builder) if slot.tie is None else TiedSlotLayer(slot, builder)

    return [form(slot) for slot in layer_plan(spec)]


def pipeline_module(
    spec: ModelSpec,
    *,
    topology: Any,
    loss_fn: Callable[[Any, tuple[torch.Tensor, ...]], torch.Tensor],
    groups: Groups,
    seed: int = 1234,
    dtype: torch.dtype | None = None,
    choices: PipelineChoices | None = None,
) -> PipelineModule:
    """The stages of `topology` that live in this process. torch.distributed must be initialised.

    topology: DeepSpeed process topology with axes pipe, data, model (PipeModelDataParallelTopology)
    loss_fn:  (Logits handle of the last slot, tuple of target tensors) -> scalar
    The first slot takes the tuple (tokens [b, s] int64, segment_ids [b, s] int32).
    Raises ConfigError where the model cannot be cut into stages.
    """
    choices = choices or PipelineChoices()
    stages = topology.get_dim("pipe")
    check_slots(spec, stages=stages)
    law = Initialiser(spec=spec.init, hidden_size=spec.hidden_size, num_layers=spec.num_layers, seed=seed)
    builder = Builder(initialiser=law, groups=groups, context=context_plan(spec, groups), dtype=dtype)
    chatter = StringIO()
    # DeepSpeed prints the partition, and broadcasts tied weights as if a gradient were wanted.
    with redirect_stdout(chatter), torch.no_grad():
        module = Stages(
            recompute=choices.recompute,
            tp=groups.tp,
            adds_aux=adds_aux(spec),
            layers=layers_of(spec, builder),
            topology=topology,
            loss_fn=loss_fn,
            partition_method=choices.partition_method,
        )
    log.debug(chatter.getvalue())
    blocks = [layer for layer in stage_layers(module) if is_block(layer)]
    share_between(blocks)
    if choices.compile_blocks:
        for block in blocks:
            block.compile()
    return module
