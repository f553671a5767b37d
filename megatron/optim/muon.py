# SPDX-License-Identifier: Apache-2.0
"""Muon for hidden matrices beside AdamW for the rest: over whole parameters, or through DeepSpeed's ZeRO."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from megatron.deepspeed_private import muon_class
from megatron.log import get_logger
from megatron.mpu.roles import Role, dimensions, roles_of
from megatron.optim.groups import LR_MULT
from megatron.optim.groupwise import GroupwiseOptimizer

log = get_logger(__name__)

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iteration: steep at zero, so that five rounds bring every singular value to between 0.7 and 1.2."""

MATRIX = "use_muon"
"""Key of a group, and for DeepSpeed attribute of a parameter: whether Muon updates it."""


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """U V^T, nearly, of matrix [n, m] = U S V^T, by Newton-Schulz iteration (Jordan et al., 2024, kellerjordan.github.io/posts/muon)."""
    a, b, c = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x / (torch.linalg.matrix_norm(x) + 1e-7)  # no singular value is above 1 now
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if tall else x


class Muon(GroupwiseOptimizer):
    """m <- momentum * m + (1 - momentum) * g;  w <- w - lr * (sqrt(max(1, n / m)) * orthogonalise(u) + decay * w),

    with u = (1 - momentum) * g + momentum * m, or m without `nesterov`, for each matrix [n, m] of the groups marked `use_muon`.
    The other groups are stepped by AdamW. The iteration runs in float32.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
    ) -> None:
        rule = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        kinds = (rule, {"betas": betas, "eps": eps})
        super().__init__([{**kinds[not group[MATRIX]], **group} for group in groups], {"lr": lr, "weight_decay": 0.0})

    def _update(self, group: dict[str, Any]) -> None:
        if not group[MATRIX]:
            self._update_others(group)
            return
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state, grad = self.state[weight], weight.grad.float()
            if not state:
                state["momentum_buffer"] = torch.zeros_like(grad)
            buffer: Tensor = state["momentum_buffer"]
            buffer.lerp_(grad, 1.0 - group["momentum"])
            update = orthogonalise(grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer, group["ns_steps"])
            rows, columns = weight.shape
            weight.mul_(1.0 - group["lr"] * group["weight_decay"])
            weight.add_(update.to(weight.dtype), alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))

    def _update_others(self, group: dict[str, Any]) -> None:
        """AdamW (Loshchilov and Hutter, arXiv 1711.05101, alg. 2) on a group that is no matrix's."""
        beta1, beta2 = group["betas"]
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state, grad = self.state[weight], weight.grad.float()
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
            state["step"] += 1
            taken = float(state["step"])
            state["exp_avg"].lerp_(grad, 1.0 - beta1)
            state["exp_avg_sq"].lerp_(grad.square(), 1.0 - beta2)
            spread = (state["exp_avg_sq"] / (1.0 - beta2**taken)).sqrt_().add_(group["eps"])
            weight.mul_(1.0 - group["lr"] * group["weight_decay"])
            weight.add_((state["exp_avg"] / spread).to(weight.dtype), alpha=-group["lr"] / (1.0 - beta1**taken))


def muon_groups(module: nn.Module, weight_decay: float, *, matrix_mult: float = 1.0, other_mult: float = 1.0) -> list[dict[str, Any]]:
    """The trainable parameters as groups {params, weight_decay, use_muon, lr_mult}: hidden matrices, tables, vectors.

    matrix_mult, other_mult: what the schedule's rate is multiplied by
    Hidden matrices with more than two dimensions go with the tables: Muon is defined on matrices.
    A fused weight (query_key_value, a gated linear1) counts as the one matrix it is stored as.
    Groups at the plain rate come first: the first group's rate is the one that is reported.
    """
    roles = roles_of(module)
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if roles[id(p)] is Role.HIDDEN and dimensions(p) == 2]
    vectors = [p for p in trained if roles[id(p)] is Role.VECTOR]
    taken = {id(p) for p in (*matrices, *vectors)}
    tables = [p for p in trained if id(p) not in taken]
    groups = [
        {"params": matrices, "weight_decay": weight_decay, MATRIX: True, LR_MULT: matrix_mult},
        {"params": tables, "weight_decay": weight_decay, MATRIX: False, LR_MULT: other_mult},
        {"params": vectors, "weight_decay": 0.0, MATRIX: False, LR_MULT: other_mult},
    ]
    return sorted((group for group in groups if group["params"]), key=lambda group: group[LR_MULT] != 1.0)


def deepspeed_muon(groups: list[dict[str, Any]], numbers: Mapping[str, Any]) -> Optimizer:
    """DeepSpeed's Muon, for ZeRO: there DeepSpeed orthogonalises whole gradients before an optimizer sees flat parts of them.

    It recognises its own class, and its parameters by an attribute.
    """
    log.info("Muon under ZeRO is DeepSpeed's; torch.compile builds its update in the first step, which takes up to a minute")
    kinds = ({"momentum": 0.95, "ns_method": "standard"}, {"betas": (0.9, 0.95), "eps": 1e-10})
    made = []
    for group in groups:
        kind = kinds[not group[MATRIX]]
        made.append({**kind, **{key: value for key, value in numbers.items() if key in kind}, "lr": numbers["lr"], **group})
        for parameter in group["params"]:
            setattr(parameter, MATRIX, group[MATRIX])
    fused = {"lr": numbers["lr"], "betas": numbers.get("betas", (0.9, 0.95)), "eps": numbers.get("eps", 1e-10)}
    optimizer: Optimizer = muon_class()(made, adam_optimizer=AdamW, adam_optimizer_kwargs=fused)
    return optimizer
