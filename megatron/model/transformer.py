# SPDX-License-Identifier: Apache-2.0
"""Runs a plan in one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron.model.block import TransformerBlock
from megatron.model.cache import LayerCache, ModelCache
from megatron.model.head import Read
from megatron.model.init import Gather, Initialiser
from megatron.model.layer_state import LayerState
from megatron.model.plan import Builder, Slot, layer_plan, share_between
from megatron.model.recompute import Recompute, run_blocks
from megatron.model.slots import check_slots, context_plan
from megatron.model.spec import ModelSpec
from megatron.mpu.groups import Groups


class Transformer(nn.Module):
    """The whole model. FORMAT: its state dict has NeoX's names, `sequential.<slot>.<param>`."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        groups: Groups | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        recompute: Recompute | None = None,
        seed: int = 1234,
        gather: Gather | None = None,
    ) -> None:
        """Build and initialise.

        device, dtype: of the parameters; device "meta" makes no weights
        recompute: how the backward pass gets the blocks' activations; None = the forward pass keeps them
        seed:   of the initial weights
        gather: makes parameters whole that were partitioned while being built (deepspeed.zero.Init)
        """
        super().__init__()
        self.spec = spec
        self.groups = Groups.single() if groups is None else groups
        self.recompute = recompute
        law = Initialiser(spec=spec.init, hidden_size=spec.hidden_size, num_layers=spec.num_layers, seed=seed, gather=gather)
        where = None if device is None else torch.device(device)
        check_slots(spec, stages=1)
        self.context = context_plan(spec, self.groups)
        builder = Builder(initialiser=law, groups=self.groups, context=self.context, device=where, dtype=dtype)
        self.plan = layer_plan(spec)
        made = {slot.number: builder.build(slot) for slot in self.slots_here() if slot.layer is not None and slot.head is None}
        share_between(made.values())
        self.sequential = nn.ModuleDict({str(number): module for number, module in made.items()})

    @property
    def blocks(self) -> list[TransformerBlock]:
        """The stack, in order."""
        return [module for module in self.sequential.values() if isinstance(module, TransformerBlock)]

    def forward(self, tokens: Tensor, segment_ids: Tensor | None = None, cache: ModelCache | None = None, read: Read | None = None) -> Any:
        """tokens [b, s] int64 -> Logits (or Values), or what `read` makes of them.

        segment_ids: [b, s] int32 document numbers, of whole rows where tokens are this rank's part of them; None = one document per row
        cache:    what `allocate_cache` gave, with the tokens before; these are appended
        read:     runs inside the head's forward (where ZeRO-3 has the head's weight whole); its result is returned
        """
        segment_ids = self.one_document(tokens) if segment_ids is None else segment_ids
        return self.finish(self.run_stack(self.embed(LayerState(tokens, segment_ids), cache), cache), read)

    def slots_here(self) -> list[Slot]:
        """The slots whose modules are built in this process."""
        return self.plan

    def one_document(self, tokens: Tensor) -> Tensor:
        """segment_ids of rows that are one document each; tokens [b, s] are this rank's part of them."""
        return tokens.new_zeros(tokens.shape[0], tokens.shape[1] * self.context.size, dtype=torch.int32)

    def embed(self, stream: LayerState, cache: ModelCache | None = None) -> LayerState:
        """The first slot: token ids become hidden states."""
        embedded: LayerState = self.sequential[str(self.plan[0].number)](stream, None if cache is None else cache[0])
        return embedded

    def finish(self, stream: LayerState, read: Read | None = None) -> Any:
        """Final norm and head -> Logits, or what `read` makes of them."""
        first, last = self.plan[0], self.plan[-1]
        stream = self.sequential[str(self.plan[-2].number)](stream)
        if last.head is not None:
            return self.sequential[str(first.number)](stream, head=partial(last.head, read=read))
        return self.sequential[str(last.number)](stream, read=read)

    def allocate_cache(self, rows: int, max_len: int, dtype: torch.dtype | None = None) -> ModelCache:
        """An empty cache for decoding `rows` rows of up to `max_len` tokens, on the model's device. dtype: None = the parameters'"""
        some = next(self.parameters())

        def of(block: TransformerBlock) -> LayerCache:
            return block.mixer.allocate_cache(rows, max_len, some.dtype if dtype is None else dtype, some.device)

        return ModelCache(map(of, self.blocks))

    def compile_blocks(self) -> None:
        """Compile every block in place (torch.compile); names in the state dict do not change."""
        for block in self.blocks:
            block.compile()

    def run_stack(self, stream: LayerState, cache: ModelCache | None = None) -> LayerState:
        """The blocks, one after the other."""
        blocks = self.blocks
        if not blocks:
            return stream
        if cache is not None:
            for block, layer in zip(blocks, cache, strict=True):
                stream = block(stream, layer)
            return stream
        return run_blocks(blocks, stream, self.recompute, tp=self.groups.tp)
