# SPDX-License-Identifier: Apache-2.0
"""Measures and clips the global gradient norm just before an optimizer steps. Knows no engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


class GradientClipper:
    """A step pre-hook for a torch optimizer.

    max_norm: gradients are scaled so that their joint L2 norm is at most this; 0 = measured only
    norm:     scalar tensor, the norm before clipping in the last step; None before the first
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], max_norm: float) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self.max_norm = max_norm
        self.norm: Tensor | None = None

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Called by torch before every optimizer step."""
        trained = [p for p in self._parameters if p.grad is not None]
        self.norm = get_total_norm([p.grad for p in trained if p.grad is not None], norm_type=2.0)
        if self.max_norm > 0:
            clip_grads_with_norm_(trained, self.max_norm, self.norm)
