# SPDX-License-Identifier: Apache-2.0
"""SM3: Adagrad that remembers one number per row and one per column. Knows no configuration."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from megatron.optim.step import GroupwiseOptimizer


class SM3(GroupwiseOptimizer):
    """Square-root of Minima of Sums of Maxima of Squared-gradients (Anil et al., arXiv 1901.11150, alg. SM3-II).

    v = min over the cover sets of an entry of their mu, times beta, plus (1 - beta) g^2 (without beta: plus g^2);
    mu of a cover set = max of v over it;  u = g / sqrt(v + eps);  m <- momentum * m + (1 - momentum) * u;  w <- w - lr * (m + decay * w)

    The cover sets of a tensor are its slices along each dimension: the rows and columns of a matrix, the entries of a vector. So a
    parameter must come in its own shape, not as a part of a flat buffer.
    beta: 0 sums squares, as in the paper; above 0 old ones are forgotten, as in Adam
    Sums are float32 whatever the parameter is. Weight decay is decoupled.
    """

    def __init__(
        self, params: Any, lr: float = 0.1, momentum: float = 0.0, beta: float = 0.0, eps: float = 1e-30, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "beta": beta, "eps": eps, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any]) -> None:
        for weight in group["params"]:
            if weight.grad is not None:
                self._update_one(weight, weight.grad.float(), group)

    def _update_one(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, momentum, beta = self.state[weight], group["momentum"], group["beta"]
        covers = range(grad.dim()) if grad.dim() else ()
        if not state:
            for dim in covers:
                state[f"cover_{dim}"] = torch.zeros(grad.shape[dim], device=grad.device)
            if not covers:
                state["cover"] = torch.zeros((), device=grad.device)
            if momentum > 0:
                state["momentum_buffer"] = torch.zeros_like(weight)
        # A slice's number, seen from every entry of the tensor.
        known = [state[f"cover_{dim}"].view([-1 if d == dim else 1 for d in covers]) for dim in covers] or [state["cover"]]
        squares = reduce(torch.minimum, known).expand_as(grad)
        squares = squares * beta + grad.square() * (1.0 - beta) if beta > 0 else squares + grad.square()
        for dim in covers:
            others = [d for d in covers if d != dim]
            state[f"cover_{dim}"].copy_(squares.amax(others) if others else squares)
        if not covers:
            state["cover"].copy_(squares)
        update = grad * (squares + group["eps"]).rsqrt()
        if momentum > 0:
            buffer: Tensor = state["momentum_buffer"]
            update = buffer.float().lerp(update, 1.0 - momentum)
            buffer.copy_(update)
        weight.mul_(1.0 - group["lr"] * group["weight_decay"])
        weight.add_(update.to(weight.dtype), alpha=-group["lr"])
