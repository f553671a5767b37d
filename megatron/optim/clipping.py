# SPDX-License-Identifier: Apache-2.0
"""Measures and clips the global gradient norm just before an optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from megatron.mpu.comm import all_reduce
from megatron.mpu.groups import Group


class GradientClipper:
    """A step pre-hook for a torch optimizer.

    max_norm: gradients are scaled so that their joint L2 norm is at most this; 0 = measured only
    over:     groups of ranks that hold other parts of the model (tensor and pipeline ranks)
    counted:  whether this rank's copy of a parameter enters the norm, where several of those ranks have one
    norm:     scalar tensor, the norm before clipping in the last step; None before the first
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        max_norm: float,
        *,
        over: Sequence[Group] = (),
        counted: Callable[[Parameter], bool] = lambda parameter: True,
    ) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._over = [group for group in over if group.size > 1]
        self._counted = counted
        self.max_norm = max_norm
        self.norm: Tensor | None = None

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Called by torch before every optimizer step."""
        trained = [p for p in self._parameters if p.grad is not None]
        # Asked now: the pipeline marks tied parameters after the clipper is made.
        own = get_total_norm([p.grad for p in trained if p.grad is not None and self._counted(p)], norm_type=2.0)
        square = own.square()
        for group in self._over:
            square = all_reduce(square.to(trained[0].device if trained else square.device), group)
        self.norm = square.sqrt() if self._over else own
        if self.max_norm > 0:
            clip_grads_with_norm_(trained, self.max_norm, self.norm)
