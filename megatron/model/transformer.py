# SPDX-License-Identifier: Apache-2.0
"""The whole model: its layers in order, each with the number it has in a checkpoint, and the modules that run them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron.errors import ConfigError
from megatron.model.block import TransformerBlock
from megatron.model.embedding import Embedding
from megatron.model.head import FinalNorm, LMHead, Read, ValueHead, tied_logits
from megatron.model.init import Gather, Initialiser
from megatron.model.layer_state import BlockSlot, LayerCache, LayerState, ModelCache
from megatron.model.recompute import Recompute, run_blocks
from megatron.model.slots import check_slots, context_plan
from megatron.model.spec import HeadKind, ModelSpec, Positions
from megatron.mpu.collectives import from_last, receive_from_previous, send_to_next
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
    return [first, Slot(1, None), *blocks, Slot(count + 2, None), Slot(count + 3, FinalNorm, spec.final_norm), last]


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


def share_between(blocks: Iterable[TransformerBlock]) -> None:
    """Let consecutive blocks use what all mixers, or all feed-forwards, of one class share: that of the first one."""
    first: dict[type, BlockSlot] = {}
    for block in blocks:
        for slot in (block.mixer, block.ffn):
            if first.setdefault(type(slot), slot) is not slot:
                slot.share(first[type(slot)])


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
        built = [slot for slot in self.slots_here() if slot.layer is not None and slot.head is None]
        self.sequential = nn.ModuleDict({str(slot.number): builder.build(slot) for slot in built})
        share_between(self.blocks)

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
        if cache is None:
            return run_blocks(self.blocks, stream, self.recompute, tp=self.groups.tp)
        for block, layer in zip(self.blocks, cache, strict=True):
            stream = block(stream, layer)
        return stream


class StagedTransformer(Transformer):
    """A Transformer whose blocks are shared out in equal runs over `groups.pp`; has no backward pass."""

    def slots_here(self) -> list[Slot]:
        """This stage's slots. A tied table is on the first stage and on the last."""
        pp, count = self.groups.pp, self.spec.num_layers
        if count < pp.size:
            raise ConfigError(f"{count} layers cannot be cut into {pp.size} stages", where="pipe_parallel_size", fix="use fewer stages")
        start, end = (count * stage // pp.size for stage in (pp.rank, pp.rank + 1))
        first, rest = self.plan[0], [slot for slot in self.plan if slot.number >= count + 3]
        here = [slot for slot in self.plan if 2 + start <= slot.number < 2 + end]
        if pp.rank == 0 or (pp.rank == pp.size - 1 and self.spec.tied):
            here = [first, *here]
        return here + rest if pp.rank == pp.size - 1 else here

    @torch.no_grad()
    def forward(self, tokens: Tensor, segment_ids: Tensor | None = None, cache: ModelCache | None = None, read: Read | None = None) -> Any:
        """As `Transformer.forward`; all stages call it with the same tokens.

        A tensor that `read` makes is given on all stages; anything else (so the handle itself) on the last one, and None on the others.
        cache: of this stage's blocks
        """
        pp = self.groups.pp
        segment_ids = self.one_document(tokens) if segment_ids is None else segment_ids
        if pp.rank == 0:
            state = self.embed(LayerState(tokens, segment_ids), cache)
        else:
            state = LayerState(receive_from_previous(pp, tokens.device), segment_ids)
        state = self.run_stack(state, cache)
        found = None
        if pp.rank < pp.size - 1:
            send_to_next(state.hidden, pp)
        else:
            found = self.finish(state, read)
        shared = torch.tensor(int(isinstance(found, Tensor)), device=tokens.device) if pp.rank == pp.size - 1 else None
        return from_last(found, pp, tokens.device) if bool(from_last(shared, pp, tokens.device)) else found
