# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of mixtures: weights, how many samples each member gives, and where a split cuts. Knows no files."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron.errors import ConfigError

OVERSIZE = 1.005


def normalise(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum; ConfigError unless all are >= 0 and one is > 0.

    >>> normalise([3, 1])
    [0.75, 0.25]
    """
    total = float(sum(weights))
    if not weights or min(weights) < 0 or not total > 0 or not math.isfinite(total):
        raise ConfigError(
            f"data weights {list(weights)} cannot be used", where="*_data_weights", fix="numbers >= 0, at least one of them > 0"
        )
    return [weight / total for weight in weights]


def samples_per_member(weights: Sequence[float], num_samples: int) -> list[int]:
    """How many samples each member is sized for: its share and half a percent more.

    >>> samples_per_member([0.7, 0.3], 96)
    [68, 29]
    """
    return [math.ceil(num_samples * weight * OVERSIZE) for weight in weights]


def by_num_documents(counts: Sequence[int], alpha: float) -> list[float]:
    """Weights from document counts n_i: (n_i / N)^alpha, normalised, times (1 - n_i / N), normalised.

    FORMAT: the law of `weight_by_num_documents` runs of old; small members are raised even at alpha 1. One member alone has weight 1.

    >>> by_num_documents([100, 300], alpha=1.0)
    [0.5, 0.5]
    """
    total = sum(counts)
    if not counts or min(counts) < 0 or total == 0:
        raise ConfigError(f"document counts {list(counts)} give no weights", where="weight_by_num_documents", fix="set weights by hand")
    shares = [count / total for count in counts]
    if max(shares) == 1.0:
        return shares
    raised = normalise([share**alpha for share in shares])
    return normalise([weight * (1 - share) for weight, share in zip(raised, shares, strict=True)])


def split_bounds(split: str, num_documents: int) -> list[int]:
    """Where train, valid and test begin and end, four numbers from 0 to num_documents.

    split: up to three proportions separated by commas or slashes.

    >>> split_bounds("969, 30, 1", 1000)
    [0, 969, 999, 1000]
    """
    try:
        parts = [float(part) for part in split.replace("/", ",").split(",") if part.strip()]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or min(parts) < 0 or not sum(parts) > 0:
        raise ConfigError(f"split {split!r} cannot be read", where="split", fix='one to three proportions >= 0, e.g. "969, 30, 1"')
    bounds = [0]
    for share in normalise(parts + [0.0] * (3 - len(parts))):
        bounds.append(bounds[-1] + round(share * num_documents))
    # What rounding leaves over or takes too much moves all inner bounds.
    excess = bounds[-1] - num_documents
    return [0] + [max(bound - excess, 0) for bound in bounds[1:]]
