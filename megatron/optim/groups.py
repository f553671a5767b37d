# SPDX-License-Identifier: Apache-2.0
"""Which parameters decay, and at which share of the rate they learn. Decided by a parameter's role, never by its name."""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron.mpu.roles import dimensions, exempt_from_decay


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters as optimizer groups: decayed first, then not decayed; empty groups are left out.

    Matrices decay, embeddings among them; vectors (biases, norm scales) do not. A module exempts further
    parameters of its own by defining `no_weight_decay() -> tuple[local parameter name, ...]`.
    Tied parameters count once. With weight_decay 0 there is one group.
    """
    exempt = exempt_from_decay(module)
    trained = [p for p in module.parameters() if p.requires_grad]
    if weight_decay == 0:
        return [{"params": trained, "weight_decay": 0.0}] if trained else []
    decay = [p for p in trained if dimensions(p) > 1 and id(p) not in exempt]
    plain = [p for p in trained if dimensions(p) <= 1 or id(p) in exempt]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
