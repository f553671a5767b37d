# SPDX-License-Identifier: Apache-2.0
"""What of each parameter, its gradient and its optimizer state lies on this rank. Knows how DeepSpeed files them, and no metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn

from megatron.engine.base import LocalShards


class WholeShards:
    """Every data rank holds everything: float32 without ZeRO, or half precision without ZeRO.

    scale: gives what gradients are multiplied by (the fp16 loss scale)
    copies: float32 copies of 16-bit parameters, which are what the optimizer updates
    """

    sharded = False

    def __init__(
        self, state: Mapping[Any, Mapping[str, Any]], scale: Callable[[], float], copies: Mapping[nn.Parameter, nn.Parameter]
    ) -> None:
        self._state = state
        self._scale = scale
        self._copies = copies

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """The parameter itself, or its float32 copy."""
        return self._copies.get(parameter, parameter).detach()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The summed gradient; there only until the update."""
        grad = parameter.grad
        return None if grad is None else _unscaled(grad, self._scale())

    def states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The optimizer's tensors of the parameter's shape."""
        own = self._state.get(self._copies.get(parameter, parameter), {})
        return {name: value for name, value in own.items() if isinstance(value, Tensor) and value.shape == parameter.shape}


class FragmentShards:
    """ZeRO 1 and 2, and bfloat16 with float32 sums: one flat float32 buffer per group, cut over the data ranks wherever it falls."""

    sharded = True

    def __init__(self, optimizer: torch.optim.Optimizer, scale: Callable[[], float]) -> None:
        self._optimizer = optimizer
        self._scale = scale

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """This rank's part of the float32 copy."""
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        return _nothing(parameter) if mapping is None else mapping.hp_fragment.detach()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """This rank's part; there only until the update."""
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return _nothing(parameter)
        grad = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()  # type: ignore[attr-defined]
        if grad.numel() == parameter.numel():
            # The bfloat16 optimizer sums whole gradients on every rank: only the part that it updates counts here.
            grad = grad.narrow(0, mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)
        return _unscaled(grad, self._scale())

    def states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """This rank's parts; there from the first update on."""
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return {}
        # Read from the flat buffer: DeepSpeed's own view of a state misses all groups but the first (zero/stage_1_and_2.py).
        flat = self._optimizer.param_groups[mapping.param_group_index]["params"][0]
        place = mapping.hp_fragment_address
        return {
            name: value.narrow(0, place.start, place.numel)
            for name, value in self._optimizer.state.get(flat, {}).items()
            if isinstance(value, Tensor) and value.shape == flat.shape
        }


class PartitionShards:
    """ZeRO 3: every parameter is cut over the data ranks into equal parts, the last one padded.

    state: the optimizer's, by flat buffer; its keys tell which states there are
    """

    sharded = True

    def __init__(self, state: Mapping[Any, Mapping[str, Any]], scale: Callable[[], float], rank: int) -> None:
        self._state = state
        self._scale = scale
        self._rank = rank

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """This rank's part of the float32 copy."""
        return self._unpadded(parameter, deepspeed.utils.safe_get_local_fp32_param(parameter))

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """This rank's part; there only until the update."""
        return _unscaled(self._unpadded(parameter, deepspeed.utils.safe_get_local_grad(parameter)), self._scale())

    def states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """This rank's parts; there from the first update on."""
        first: Mapping[str, Any] = next(iter(self._state.values()), {})
        names = [name for name, value in first.items() if isinstance(value, Tensor) and value.dim() > 0]
        read = deepspeed.utils.safe_get_local_optimizer_state
        return {name: self._unpadded(parameter, read(parameter, name)) for name in names}

    def _unpadded(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        whole = int(parameter.ds_numel)  # type: ignore[attr-defined]
        return part.flatten()[: max(0, min(part.numel(), whole - self._rank * part.numel()))]


def local_shards_of(engine: Any, scale: Callable[[], float], rank: int) -> LocalShards:
    """The shards of a DeepSpeed engine's parameters. rank: within the data parallel group"""
    outer = engine.optimizer
    inner = getattr(outer, "optimizer", outer)
    if engine.zero_optimization_stage() == 3:
        return PartitionShards(inner.state, scale, rank)
    if any(hasattr(parameter, "_hp_mapping") for parameter in engine.module.parameters()):
        return FragmentShards(inner, scale)
    return WholeShards(inner.state, scale, copies_of(outer))


def copies_of(outer: Any) -> dict[nn.Parameter, nn.Parameter]:
    """16-bit parameter -> float32 copy, of DeepSpeed's optimizer for 16 bits without ZeRO; empty for all others."""
    if not isinstance(outer, FP16_UnfusedOptimizer):
        return {}
    pairs = zip(outer.fp16_groups, outer.fp32_groups, strict=True)
    return {half: copy for halves, wholes in pairs for half, copy in zip(halves, wholes, strict=True)}


def _nothing(parameter: nn.Parameter) -> Tensor:
    return torch.zeros(0, dtype=torch.float32, device=parameter.device)


def _unscaled(grad: Tensor, scale: float) -> Tensor:
    return grad.detach() if scale == 1.0 else grad.detach().float() / scale
