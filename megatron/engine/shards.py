# SPDX-License-Identifier: Apache-2.0
"""What of each parameter, its gradient and its optimizer state lies on this rank, as DeepSpeed keeps it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor, nn

from megatron import deepspeed_private as private


class Place(NamedTuple):
    """Where this rank keeps entries of a parameter: `size` of them, from `start` on in `buffer`, from `first` on in the parameter."""

    buffer: nn.Parameter
    start: int
    first: int
    size: int


class WholeShards:
    """Every data rank holds everything: float32 without ZeRO, or half precision without ZeRO.

    scale: gives what gradients are multiplied by (the fp16 loss scale)
    copies: float32 copies of 16-bit parameters, which are what the optimizer updates
    """

    sharded = False

    def __init__(self, state: Any, scale: Callable[[], float], copies: Mapping[nn.Parameter, nn.Parameter]) -> None:
        self.state = state
        self._scale = scale
        self._copies = copies

    def place(self, parameter: nn.Parameter) -> Place:
        """The parameter itself, or its float32 copy."""
        return Place(self._copies.get(parameter, parameter), 0, 0, parameter.numel())

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """The parameter itself, or its float32 copy."""
        return self.place(parameter).buffer.detach()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The summed gradient; there only until the update."""
        grad = parameter.grad
        return None if grad is None else _unscaled(grad, self._scale())

    def states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The optimizer's tensors of the parameter's shape."""
        own = self.state.get(self.place(parameter).buffer, {})
        return {name: value for name, value in own.items() if isinstance(value, Tensor) and value.shape == parameter.shape}


class FragmentShards:
    """ZeRO 1 and 2, and bfloat16 with float32 sums: one flat float32 buffer per group, cut over the data ranks wherever it falls."""

    sharded = True

    def __init__(self, optimizer: torch.optim.Optimizer, scale: Callable[[], float]) -> None:
        self.state: Any = optimizer.state
        self._groups = optimizer.param_groups
        self._scale = scale

    def place(self, parameter: nn.Parameter) -> Place | None:
        """This rank's part, in the flat buffer of the parameter's group; None where it has none."""
        part = private.fragment_of(parameter)
        return None if part is None else Place(self._groups[part.group]["params"][0], part.start, part.first, part.size)

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """This rank's part of the float32 copy."""
        place = self.place(parameter)
        return _nothing(parameter) if place is None else place.buffer.detach().narrow(0, place.start, place.size)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """This rank's part; there only until the update."""
        if private.fragment_of(parameter) is None:
            return _nothing(parameter)
        return _unscaled(private.fragment_gradient(parameter), self._scale())

    def states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """This rank's parts; there from the first update on."""
        place = self.place(parameter)
        if place is None:
            return {}
        # Read from the flat buffer: DeepSpeed's own view of a state misses all groups but the first (zero/stage_1_and_2.py).
        return {
            name: value.narrow(0, place.start, place.size)
            for name, value in self.state.get(place.buffer, {}).items()
            if isinstance(value, Tensor) and value.shape == place.buffer.shape
        }


class PartitionShards:
    """ZeRO 3: every parameter is cut over the data ranks into equal parts, the last one padded.

    outer: DeepSpeed's optimizer. rank: within the data parallel group
    """

    sharded = True

    def __init__(self, outer: Any, scale: Callable[[], float], rank: int) -> None:
        self.state: Any = private.inner_optimizer(outer).state
        self._outer = outer
        self._scale = scale
        self._rank = rank

    def place(self, parameter: nn.Parameter) -> Place:
        """This rank's part, in a flat buffer."""
        buffer, start, count = private.partition_of(self._outer, parameter)
        whole = private.entries_of(parameter)
        first = min(self._rank * count, whole)
        return Place(buffer, start, first, min(count, whole - first))

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """This rank's part of the float32 copy."""
        return self._unpadded(parameter, deepspeed.utils.safe_get_local_fp32_param(parameter))

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """This rank's part; there only until the update."""
        return _unscaled(self._unpadded(parameter, deepspeed.utils.safe_get_local_grad(parameter)), self._scale())

    def states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """This rank's parts; there from the first update on."""
        # The keys of any buffer tell which states there are.
        first: Mapping[str, Any] = next(iter(self.state.values()), {})
        names = [name for name, value in first.items() if isinstance(value, Tensor) and value.dim() > 0]
        read = deepspeed.utils.safe_get_local_optimizer_state
        return {name: self._unpadded(parameter, read(parameter, name)) for name in names}

    def _unpadded(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        whole = private.entries_of(parameter)
        return part.flatten()[: max(0, min(part.numel(), whole - self._rank * part.numel()))]


Shards = WholeShards | FragmentShards | PartitionShards


def local_shards_of(engine: Any, scale: Callable[[], float], rank: int) -> Shards:
    """The shards of a DeepSpeed engine's parameters. rank: within the data parallel group"""
    inner = private.inner_optimizer(engine.optimizer)
    if engine.zero_optimization_stage() == 3:
        return PartitionShards(engine.optimizer, scale, rank)
    if private.has_fragments(engine.module):
        return FragmentShards(inner, scale)
    return WholeShards(inner.state, scale, private.copies_of(engine.optimizer))


def _nothing(parameter: nn.Parameter) -> Tensor:
    return torch.zeros(0, dtype=torch.float32, device=parameter.device)


def _unscaled(grad: Tensor, scale: float) -> Tensor:
    return grad.detach() if scale == 1.0 else grad.detach().float() / scale
