# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of tokens and of whole rows, on logits that may be split over the vocabulary. Knows no objective."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from megatron.model.head import Logits


def token_logps(logits: Logits, labels: Tensor, weights: Tensor) -> Tensor:
    """log p(label) at every position, 0 where the weight is 0.

    labels [b, s] int64, weights [b, s] float -> [b, s] float32
    """
    used = weights != 0
    return logits.token_logps(labels, used).masked_fill(~used, 0.0)


def sequence_logps(logits: Logits, labels: Tensor, weights: Tensor, *, average: bool = False) -> Tensor:
    """Weighted log-probability of each row.

    labels [b, s] int64, weights [b, s] float -> [b] float32; `average` divides by the row's summed |weight|
    (rows without a trained token give 0).
    """
    total = (token_logps(logits, labels, weights) * weights).sum(dim=-1)
    if not average:
        return total
    trained = weights.abs().sum(dim=-1)
    return total / trained.masked_fill(trained == 0, 1.0)
