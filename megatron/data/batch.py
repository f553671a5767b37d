# SPDX-License-Identifier: Apache-2.0
"""A micro batch of token rows, ready for a model. Knows no dataset and no objective."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro batch.

    tokens      [b, s] int64   model input
    labels      [b, s] int64   next token, already shifted; where loss_weight is 0 any valid id
    loss_weight [b, s] float32 0 = not trained; negative = gradient ascent
    segment_ids    [b, s] int32   document number in the row (all 0 = joined)
    extras      further named targets of an objective (ref_logps, rewards, ...)
    """

    tokens: Tensor
    labels: Tensor
    loss_weight: Tensor
    segment_ids: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
