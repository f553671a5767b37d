# SPDX-License-Identifier: Apache-2.0
"""One layer of the stack: norms, attention, MLP and how they join the residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from megatron.model.attention.layer import SelfAttention
from megatron.model.layer_state import LayerState
from megatron.model.mlp import MLP
from megatron.model.norms import ALONE, build_norm
from megatron.model.spec import BlockSpec, Residual
from megatron.mpu.comm import reduce_from_region
from megatron.mpu.context import ContextPlan
from megatron.mpu.groups import Group
from megatron.mpu.random import dropout

if TYPE_CHECKING:
    from megatron.model.cache import LayerCache

# FORMAT: norms that the reference builds and never uses. They are not parameters here; a checkpoint may hold them.
UNUSED_NORM = {Residual.POST_SUBLAYER: "input_layernorm", Residual.PARALLEL_TIED: "post_attention_layernorm"}


class TransformerBlock(nn.Module):
    """LayerState -> LayerState under one of four residual forms (`Residual`). The class name is matched by `type:transformer`."""

    def __init__(self, spec: BlockSpec, *, tp: Group, context: ContextPlan | None = None) -> None:
        super().__init__()
        form = spec.residual
        self.form = form
        self.dropout = spec.hidden_dropout
        self.tp = tp
        # In the parallel forms both sublayers give this rank's share, and one reduce serves their sum.
        defer = form in (Residual.PARALLEL, Residual.PARALLEL_TIED)
        if form is not Residual.POST_SUBLAYER:
            self.input_layernorm = build_norm(spec.norm, tp=tp)
        self.attention = SelfAttention(spec.attention, tp=tp, defer_reduce=defer, context=context)
        if form is not Residual.PARALLEL_TIED:
            self.post_attention_layernorm = build_norm(spec.norm, tp=tp)
        if form is Residual.POST_SUBLAYER:
            self.post_feedforward_layernorm = build_norm(spec.norm, tp=tp)
        self.mlp = MLP(spec.mlp, tp=tp, defer_reduce=defer)

    def forward(self, stream: LayerState, cache: LayerCache | None = None) -> LayerState:
        """hidden [b, s, h], segment_ids [b, s] -> the same shapes. In place of segment_ids, the `PackedSequences` made of them may come.

        Of hidden this rank has its part: s is divided by the context ranks, and by the tensor ranks where they spread the sequence.
        """
        hidden, segment_ids = stream
        if self.form is Residual.SEQUENTIAL:
            hidden = hidden + self._drop(self.attention(self.input_layernorm(hidden), segment_ids, cache))
            hidden = hidden + self._drop(self.mlp(self.post_attention_layernorm(hidden)))
        elif self.form is Residual.POST_SUBLAYER:
            hidden = hidden + self._drop(self.post_attention_layernorm(self.attention(hidden, segment_ids, cache)))
            hidden = hidden + self._drop(self.post_feedforward_layernorm(self.mlp(hidden)))
        else:
            normed = self.input_layernorm(hidden)
            mlp_input = normed if self.form is Residual.PARALLEL_TIED else self.post_attention_layernorm(hidden)
            # Dropout before the sum draws the same mask of the whole sequence on every rank of tp, so it drops whole sums.
            share = self._drop_whole(self.attention(normed, segment_ids, cache)) + self._drop_whole(self.mlp(mlp_input))
            hidden = hidden + reduce_from_region(share, self.tp)
        return LayerState(hidden, segment_ids)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        unused = UNUSED_NORM.get(self.form)
        for name in [name for name in state_dict if unused is not None and name.startswith(f"{prefix}{unused}.")]:
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.tp, training=self.training)

    def _drop_whole(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, ALONE, training=self.training)


def unused_stored_prefixes(module: nn.Module) -> tuple[str, ...]:
    """Prefixes of state dict names that a reference checkpoint of this model may hold and no module has."""
    blocks = ((name, child) for name, child in module.named_modules() if isinstance(child, TransformerBlock))
    return tuple(f"{name}.{UNUSED_NORM[block.form]}.".removeprefix(".") for name, block in blocks if block.form in UNUSED_NORM)
