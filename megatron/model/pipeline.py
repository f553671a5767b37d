# SPDX-License-Identifier: Apache-2.0
"""The same plan as a DeepSpeed PipelineModule. The only file that knows DeepSpeed's pipeline module; knows no optimizer."""

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
from torch import nn

from megatron.deepspeed_private import count_micro_batch, stage_layers
from megatron.errors import ConfigError
from megatron.log import get_logger
from megatron.model.block import TransformerBlock
from megatron.model.init import Initialiser
from megatron.model.layer_state import LayerState
from megatron.model.plan import Builder, Slot, context_plan, layer_plan, share_position_bias
from megatron.model.recompute import Recompute, run_blocks
from megatron.model.spec import ModelSpec
from megatron.mpu.groups import Group, Groups

log = get_logger(__name__)

TIED_WEIGHT = "word_embeddings.weight"


@dataclass(frozen=True, kw_only=True)
class PipelineChoices:
    """How the plan is cut and run.

    partition_method:  DeepSpeed's: type:REGEX on class names | parameters | uniform
    recompute:         how the backward pass gets the blocks' activations; None = the forward pass keeps them
    dynamic_shape:     micro batches of changing shape (curriculum, evaluation on other lengths)
    compile_blocks:    torch.compile each block
    """

    partition_method: str = "type:transformer|mlp"
    recompute: Recompute | None = None
    dynamic_shape: bool = False
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
        super().__init__(slot.tie, slot.layer, forward_fn=slot.head and call_head(slot.head), tied_weight_attr=TIED_WEIGHT)
        self.slot = slot
        self.builder = builder

    def build(self, log: bool = False) -> nn.Module:
        """The shared module with initial weights, drawn under the name of the first slot on every stage."""
        return self.builder.build(Slot(0, self.slot.layer, self.slot.spec, placed=True))


class Stages(PipelineModule):  # type: ignore[misc]  # deepspeed is untyped
    """DeepSpeed's module with another way to run a stage's layers: spans of recomputation count blocks, from the stage's first one.

    DeepSpeed counts every layer from the stage's beginning, so a span could reach into the head. `seed_layers` is not offered.
    """

    def __init__(self, *, recompute: Recompute | None, tp: Group, **deepspeeds: Any) -> None:
        super().__init__(**deepspeeds)
        self.recompute = recompute
        self.tp = tp

    def forward(self, forward_input: Any) -> Any:
        """What the stage before sends (the first stage: the inputs of a micro batch) through all layers of this stage."""
        count_micro_batch(self)
        flow = forward_input
        for are_blocks, layers in groupby(stage_layers(self), key=is_block):
            if are_blocks:
                flow = run_blocks(list(layers), LayerState(*flow), self.recompute, tp=self.tp)
                continue
            for layer in layers:
                flow = layer(flow)
        return flow


def is_block(layer: Any) -> bool:
    """Whether a layer of a stage is one of the stack, whatever its mixer."""
    return isinstance(layer, TransformerBlock)


def call_head(head: Callable[..., Any]) -> Callable[[nn.Module, Any], Any]:
    """The form that DeepSpeed wants a tied head in: (module, stream) -> handle."""

    def run(module: nn.Module, stream: Any) -> Any:
        return module(stream, head=head)

    return run


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
    if stages > 1 and any(block.attention.rpe is not None for block in spec.blocks):
        raise ConfigError(
            "a relative position table is shared by all layers and cannot be spread over pipeline stages",
            where="pos_emb: rpe, pipe_parallel_size",
            fix="set pipe_parallel_size to 0 or 1, or use another pos_emb",
        )
    law = Initialiser(spec=spec.init, hidden_size=spec.hidden_size, num_layers=spec.num_layers, seed=seed)
    builder = Builder(initialiser=law, tp=groups.tp, context=context_plan(spec, groups), dtype=dtype)
    chatter = StringIO()
    # DeepSpeed prints the partition, and broadcasts tied weights as if a gradient were wanted.
    with redirect_stdout(chatter), torch.no_grad():
        module = Stages(
            recompute=choices.recompute,
            tp=groups.tp,
            layers=layers_of(spec, builder),
            topology=topology,
            loss_fn=loss_fn,
            partition_method=choices.partition_method,
            dynamic_shape=choices.dynamic_shape,
        )
    log.debug(chatter.getvalue())
    blocks = [layer for layer in stage_layers(module) if isinstance(layer, TransformerBlock)]
    share_position_bias(list(blocks))
    if choices.compile_blocks:
        for block in blocks:
            block.compile()
    return module
