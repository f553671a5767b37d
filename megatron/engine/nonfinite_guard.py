# SPDX-License-Identifier: Apache-2.0
"""Refuses an optimizer step whose loss or gradient is not finite, before anything is updated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron.engine.base import LocalShards
from megatron.mpu.comm import all_reduce
from megatron.mpu.groups import Group


class UpdateGuard:
    """Decides once per step, on all ranks alike, and keeps a torch optimizer from updating when the answer is no.

    A step without gradients changes nothing in an optimizer, neither weights nor moments nor step counts. So a refused one is shown none,
    and DeepSpeed, which drives it, goes on as after any other step: what it copies and gathers then is what was there before.

    optimizer: the innermost
    gradients: whether those decide, too; not where a loss scale makes them overflow on purpose
    refused:   what was not finite in the last step, and on which rank first; "" = the update was made
    """

    def __init__(self, optimizer: torch.optim.Optimizer, world: Group, *, gradients: bool = True) -> None:
        self._world = world
        self._gradients = gradients
        self._loss: Tensor | None = None
        self._hidden: list[tuple[Parameter, Tensor]] = []
        self.refused = ""
        optimizer.register_step_pre_hook(self._hide)
        optimizer.register_step_post_hook(self._give_back)

    def see(self, loss: Tensor) -> None:
        """The loss of a micro batch of the step under way."""
        loss = loss.detach().float()
        self._loss = loss if self._loss is None else self._loss + loss

    def decide(self, parameters: Sequence[Parameter], shards: LocalShards, device: torch.device) -> None:
        """Look at this step, whose gradients are complete. All ranks call it."""
        loss, self._loss = self._loss, None
        own = torch.zeros(2, device=device)
        if loss is not None:
            own[0] = ~loss.isfinite()
        if self._gradients:
            own[1] = ~self._norms(parameters, shards, device).isfinite().all()
        # The largest of these numbers names the first rank.
        first = all_reduce(own * (self._world.size - self._world.rank), self._world, maximum=True).tolist()
        names = zip(("loss", "gradient"), first, strict=True)
        self.refused = ", ".join(f"{name} on rank {self._world.size - int(number)}" for name, number in names if number)

    def _norms(self, parameters: Sequence[Parameter], shards: LocalShards, device: torch.device) -> Tensor:
        """L2 norm of this rank's shard of every gradient, and of all of them. [number of shards + 1]"""
        found = [grad for p in parameters if (grad := shards.gradient(p)) is not None and grad.numel()]
        if not found:
            return torch.zeros(1, device=device)
        norms = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float32).to(device) for grad in found])
        return torch.cat([norms, norms.norm().reshape(1)])

    def _hide(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self.refused:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._hidden.append((parameter, parameter.grad))
                    parameter.grad = None

    def _give_back(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # With the optimizer on the host, DeepSpeed keeps one buffer per gradient for the whole run.
        for parameter, grad in self._hidden:
            parameter.grad = grad
        self._hidden = []
