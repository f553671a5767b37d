# SPDX-License-Identifier: Apache-2.0
"""MADGRAD with decoupled decay: dual averaging with cube roots. Knows no configuration."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron.optim.step import GroupwiseOptimizer


class MADGRADW(GroupwiseOptimizer):
    """Momentumized, adaptive, dual averaged gradient (Defazio and Jelassi, arXiv 2101.11075, alg. 1).

    In step k = 0, 1, ...:  l = lr * sqrt(k + 1);  s <- s + l g;  v <- v + l g^2;  z = w_0 - s / (cbrt(v) + eps);
    w <- momentum * w + (1 - momentum) * z - lr * decay * w

    The decay is outside of the averages, as in AdamW (Loshchilov and Hutter, arXiv 1711.05101). Every entry is updated by itself, so a flat
    part of a tensor will do. All sums are float32 and start from the weights at the first step.
    """

    def __init__(self, params: Any, lr: float = 1e-2, momentum: float = 0.9, eps: float = 1e-6, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any]) -> None:
        for weight in group["params"]:
            if weight.grad is not None:
                self._update_one(weight, weight.grad.float(), group)

    def _update_one(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, lr, momentum = self.state[weight], group["lr"], group["momentum"]
        if not state:
            state["step"] = torch.zeros(())
            state["start"] = weight.detach().float().clone()
            state["grad_sum"] = torch.zeros_like(grad)
            state["square_sum"] = torch.zeros_like(grad)
        share = lr * math.sqrt(float(state["step"]) + 1.0)
        state["step"] += 1
        state["grad_sum"].add_(grad, alpha=share)
        state["square_sum"].addcmul_(grad, grad, value=share)
        # cbrt: torch has none; the sum is never negative.
        target = torch.addcdiv(state["start"], state["grad_sum"], state["square_sum"].pow(1.0 / 3.0).add_(group["eps"]), value=-1.0)
        kept = momentum - lr * group["weight_decay"]
        weight.copy_(weight.float().mul_(kept).add_(target, alpha=1.0 - momentum))
