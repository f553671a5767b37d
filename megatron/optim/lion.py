# SPDX-License-Identifier: Apache-2.0
"""Lion: a step in the direction of the sign of an interpolated momentum. Knows no configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.optim.step import GroupwiseOptimizer


class Lion(GroupwiseOptimizer):
    """Evolved sign momentum (Chen et al., arXiv 2302.06675, alg. 2).

    u = sign(beta1 * m + (1 - beta1) * g);  w <- w - lr * (u + weight_decay * w);  m <- beta2 * m + (1 - beta2) * g

    lr is usually 3 to 10 times smaller, weight_decay as many times larger than with AdamW (sec. 5 of the paper).
    """

    def __init__(self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any]) -> None:
        """One update of a group, all its tensors in one call each."""
        weights: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        if not weights:
            return
        grads = [p.grad.to(p.dtype) for p in weights if p.grad is not None]
        for weight in weights:
            if "exp_avg" not in self.state[weight]:
                self.state[weight]["exp_avg"] = torch.zeros_like(weight)
        momenta: list[Tensor] = [self.state[p]["exp_avg"] for p in weights]
        beta1, beta2 = group["betas"]
        direction = torch._foreach_lerp(grads, momenta, beta1)
        torch._foreach_sign_(direction)
        torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, direction, alpha=-group["lr"])
        torch._foreach_lerp_(momenta, grads, 1.0 - beta2)
