# SPDX-License-Identifier: Apache-2.0
"""Our own optimizers: Lion, MADGRAD with decoupled decay, SM3, Muon with AdamW beside it, and DeepSpeed's Muon for ZeRO."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from megatron.deepspeed_private import muon_class
from megatron.log import get_logger
from megatron.optim.groups import MATRIX


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

    def _update(self, group: dict[str, Any]) -> None:
        """One update of a group."""
        for weight in group["params"]:
            if weight.grad is not None:
                self._update_one(weight, weight.grad.float(), group)

    def _update_one(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """One update of a parameter by its gradient, in float32."""
        raise NotImplementedError


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


class MADGRADW(GroupwiseOptimizer):
    """Momentumized, adaptive, dual averaged gradient (Defazio and Jelassi, arXiv 2101.11075, alg. 1).

    In step k = 0, 1, ...:  l = lr * sqrt(k + 1);  s <- s + l g;  v <- v + l g^2;  z = w_0 - s / (cbrt(v) + eps);
    w <- momentum * w + (1 - momentum) * z - lr * decay * w

    The decay is outside of the averages, as in AdamW (Loshchilov and Hutter, arXiv 1711.05101). Every entry is updated by itself, so a flat
    part of a tensor will do. All sums are float32 and start from the weights at the first step.
    """

    def __init__(self, params: Any, lr: float = 1e-2, momentum: float = 0.9, eps: float = 1e-6, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay})

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


log = get_logger(__name__)

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iteration: steep at zero, so that five rounds bring every singular value to between 0.7 and 1.2."""


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

    def _update_one(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if not group[MATRIX]:
            self._adamw(weight, grad, group)
            return
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(grad, 1.0 - group["momentum"])
        update = orthogonalise(grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer, group["ns_steps"])
        rows, columns = weight.shape
        weight.mul_(1.0 - group["lr"] * group["weight_decay"])
        weight.add_(update.to(weight.dtype), alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))

    def _adamw(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """AdamW (Loshchilov and Hutter, arXiv 1711.05101, alg. 2) for a parameter that Muon does not update."""
        state, (beta1, beta2) = self.state[weight], group["betas"]
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
