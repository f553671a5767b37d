# SPDX-License-Identifier: Apache-2.0
"""Where a fault plan (megatron/fault_injection.py) reaches losses, gradients and weights. Without a plan nothing here does anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron import fault_injection
from megatron.engine.base import LocalShards
from megatron.objectives.base import LossTerms


def disturbed(terms: LossTerms) -> LossTerms:
    """Site `loss`: of one micro batch, its metrics with it."""
    factor = fault_injection.changed("loss", 1.0)
    if factor == 1.0:
        return terms
    metrics = {name: metric._replace(value=metric.value * factor) for name, metric in terms.metrics.items()}
    return LossTerms(loss=terms.loss * factor, metrics=metrics)


def disturb_backward(parameters: Sequence[Parameter]) -> None:
    """Site `gradient`: of the first parameter, of one micro batch, before it is summed over ranks."""

    def change(grad: Tensor) -> Tensor:
        return fault_injection.changed("gradient", grad)

    if fault_injection.planned() and parameters:
        parameters[0].register_hook(change)


def disturb_reduced(parameters: Sequence[Parameter], shards: LocalShards) -> None:
    """Site `reduced`: of the first parameter, after it was summed over ranks. Reaches gradients that every rank has whole."""
    if fault_injection.planned() and parameters and not shards.sharded:
        grad = shards.gradient(parameters[0])
        if grad is not None:
            grad.copy_(fault_injection.changed("reduced", grad))


def disturb_weights(parameters: Sequence[Parameter]) -> None:
    """Site `weight`: the first parameter, after the update."""
    if fault_injection.planned() and parameters and parameters[0].numel():
        with torch.no_grad():
            parameters[0].copy_(fault_injection.changed("weight", parameters[0]))
