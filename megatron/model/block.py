# SPDX-License-Identifier: Apache-2.0
"""One layer of the stack: norms, and how a mixer and a feed-forward join the residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from megatron.model.layer_state import FeedForward, LayerState, Mixer, SlotOutput
from megatron.model.norms import ALONE, build_norm
from megatron.model.slots import ffn_class, mixer_class
from megatron.model.spec import BlockSpec, Residual
from megatron.mpu.comm import reduce_from_region
from megatron.mpu.context import ContextPlan
from megatron.mpu.groups import Group
from megatron.mpu.random import dropout
from megatron.mpu.sharding import stated

if TYPE_CHECKING:
    from megatron.model.layer_state import LayerCache

# FORMAT: norms that the reference builds and never uses. They are not parameters here; a checkpoint may hold them.
UNUSED_NORM = {Residual.POST_SUBLAYER: "input_layernorm", Residual.PARALLEL_TIED: "post_attention_layernorm"}


class TransformerBlock(nn.Module):
    """LayerState -> LayerState under one of four residual forms (`Residual`). The class name is matched by `type:transformer`.

    FORMAT: the mixer is called `attention` and the feed-forward `mlp` in checkpoints, whatever they are.
    """

    def __init__(self, spec: BlockSpec, *, tp: Group, context: ContextPlan | None = None) -> None:
        super().__init__()
        form = spec.residual
        self.form = form
        self.dropout = spec.hidden_dropout
        self.tp = tp
        self.compiled = False
        # In the parallel forms both sublayers give this rank's share, and one reduce serves their sum.
        defer = form in (Residual.PARALLEL, Residual.PARALLEL_TIED)
        if form is not Residual.POST_SUBLAYER:
            self.input_layernorm = build_norm(spec.norm, tp=tp)
        self.attention = cast(Any, mixer_class(spec.mixer))(spec.mixer, tp=tp, defer_reduce=defer, context=context)
        if form is not Residual.PARALLEL_TIED:
            self.post_attention_layernorm = build_norm(spec.norm, tp=tp)
        if form is Residual.POST_SUBLAYER:
            self.post_feedforward_layernorm = build_norm(spec.norm, tp=tp)
        self.mlp = cast(Any, ffn_class(spec.ffn))(spec.ffn, tp=tp, defer_reduce=defer)

    @property
    def mixer(self) -> Mixer:
        """The module in the first slot."""
        return cast(Mixer, self.attention)

    @property
    def ffn(self) -> FeedForward:
        """The module in the second slot."""
        return cast(FeedForward, self.mlp)

    def forward(self, stream: LayerState, cache: LayerCache | None = None) -> LayerState:
        """hidden [b, s, h], segment_ids [b, s] -> the same shapes. In place of segment_ids, the `PackedSequences` made of them may come.

        Of hidden this rank has its part: s is divided by the context ranks, and by the tensor ranks where they spread the sequence.
        """
        hidden, segment_ids, aux = stream
        if self.form is Residual.SEQUENTIAL:
            mixed, aux = _split(self.attention(self.input_layernorm(hidden), segment_ids, cache), aux)
            hidden = hidden + self._drop(mixed)
            fed, aux = _split(self.mlp(self.post_attention_layernorm(hidden)), aux)
            hidden = hidden + self._drop(fed)
        elif self.form is Residual.POST_SUBLAYER:
            mixed, aux = _split(self.attention(hidden, segment_ids, cache), aux)
            hidden = hidden + self._drop(self.post_attention_layernorm(mixed))
            fed, aux = _split(self.mlp(hidden), aux)
            hidden = hidden + self._drop(self.post_feedforward_layernorm(fed))
        else:
            normed = self.input_layernorm(hidden)
            ffn_input = normed if self.form is Residual.PARALLEL_TIED else self.post_attention_layernorm(hidden)
            mixed, aux = _split(self.attention(normed, segment_ids, cache), aux)
            # Dropout before the sum draws the same mask of the whole sequence on every rank of tp, so it drops whole sums.
            share = self._drop(mixed, ALONE)
            fed, aux = _split(self.mlp(ffn_input), aux)
            hidden = hidden + reduce_from_region(share + self._drop(fed, ALONE), self.tp)
        return LayerState(hidden, segment_ids, aux)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile in place; documents then come in tensors of fixed shape (`PackedSequences.of`)."""
        self.compiled = True
        super().compile(*args, **kwargs)

    def unused_stored(self) -> tuple[str, ...]:
        """Names that a reference checkpoint may hold below this module and that are not read."""
        return (f"{UNUSED_NORM[self.form]}.",) if self.form in UNUSED_NORM else ()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        unused = tuple(prefix + name for name in self.unused_stored())
        for name in [name for name in state_dict if name.startswith(unused)]:
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _drop(self, x: Tensor, tp: Group | None = None) -> Tensor:
        return dropout(x, self.dropout, tp or self.tp, training=self.training)


def _split(output: SlotOutput, aux: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A slot's hidden states, and what all layers so far add to the loss."""
    if isinstance(output, Tensor):
        return output, aux
    hidden, added = output
    return hidden, added.float() if aux is None else aux + added.float()


def unused_stored_prefixes(module: nn.Module) -> tuple[str, ...]:
    """Prefixes of state dict names that a reference checkpoint of this model may hold and no module reads.

    Any module may name its own by `unused_stored() -> tuple[local name prefix, ...]`.
    """
    return tuple(prefix + name for prefix, _, names in stated(module, "unused_stored") for name in names)
