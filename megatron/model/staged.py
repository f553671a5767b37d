# SPDX-License-Identifier: Apache-2.0
"""A frozen model in pipeline stages: each rank builds its own stage's layers and runs them when the stage before has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron.errors import ConfigError
from megatron.model.head import Read
from megatron.model.layer_state import LayerState
from megatron.model.plan import Slot
from megatron.model.transformer import Transformer
from megatron.mpu.stages import from_last, receive_from_previous, send_to_next

if TYPE_CHECKING:
    from megatron.model.cache import ModelCache


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
