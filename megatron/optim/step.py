# SPDX-License-Identifier: Apache-2.0
"""What our own optimizers share: a step over every group, with an optional closure. Knows no update rule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer


class GroupwiseOptimizer(Optimizer):
    """An optimizer that updates one group after the other."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; sums keep the number format they were kept in, whatever that of the parameter is."""
        super().load_state_dict(state_dict)  # torch brings states to the parameter's format
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.detach().clone().to(self.state[parameter][name].device)

    @abstractmethod
    def _update(self, group: dict[str, Any]) -> None:
        """One update of a group."""
