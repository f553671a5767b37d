# SPDX-License-Identifier: Apache-2.0
"""A weighted mixture of datasets in a fixed order: weights, how many samples each member gives, where a split cuts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.data.streams import Item
from megatron.errors import ConfigError, DataError

OVERSIZE = 1.005
MANY = 24  # members from which a numpy step is faster than a loop over them


class Dataset(Protocol):
    """Items by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item: ...


def blend_indices(weights: Sequence[float], num_samples: int) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """Which member gives sample i, and which of that member's samples it is: two arrays [n].

    Step i goes to the member that lags most behind its share: the largest weight * max(i, 1) - (samples given), the first of equals.
    So the mixture is even at every step, and a member never gives more than its share plus one.

    >>> blend_indices([0.7, 0.3], 6)[0].tolist(), blend_indices([0.7, 0.3], 6)[1].tolist()
    ([0, 1, 0, 0, 1, 0], [0, 0, 1, 2, 1, 3])
    """
    dtype = np.uint8 if len(weights) <= 255 else np.int32
    if len(weights) == 1:
        return np.zeros(num_samples, dtype), np.arange(num_samples, dtype=np.int64)
    members = (_lagging_many if len(weights) > MANY else _lagging)(weights, num_samples, dtype)
    order = np.argsort(members, kind="stable")
    counts = np.bincount(members, minlength=len(weights))
    rank = np.empty(num_samples, dtype=np.int64)
    rank[order] = np.arange(num_samples) - np.repeat(np.cumsum(counts) - counts, counts)
    return members, rank


def _lagging(weights: Sequence[float], num_samples: int, dtype: type[np.integer]) -> NDArray[np.integer]:
    members = np.empty(num_samples, dtype)
    given = [0] * len(weights)
    pairs = list(enumerate(weights))
    for i in range(num_samples):
        at, chosen, most = i or 1, 0, -np.inf
        for member, weight in pairs:
            lag = weight * at - given[member]
            if lag > most:
                chosen, most = member, lag
        given[chosen] += 1
        members[i] = chosen
    return members


def _lagging_many(weights: Sequence[float], num_samples: int, dtype: type[np.integer]) -> NDArray[np.integer]:
    members = np.empty(num_samples, dtype)
    share = np.asarray(weights, dtype=np.float64)
    given, lag = np.zeros_like(share), np.empty_like(share)
    for i in range(num_samples):
        np.multiply(share, float(i or 1), out=lag)
        np.subtract(lag, given, out=lag)
        chosen = int(lag.argmax())
        given[chosen] += 1
        members[i] = chosen
    return members


class BlendedDataset:
    """Sample i of the mixture is sample `ranks[i]` of member `members[i]`, both from `blend_indices`.

    Raises DataError where a member is shorter than the mixture asks: nothing is repeated unnoticed.
    """

    def __init__(self, datasets: Sequence[Dataset], members: NDArray[np.integer], ranks: NDArray[np.integer]) -> None:
        self.datasets, self._members, self._ranks = list(datasets), members, ranks
        for number, wanted in enumerate(np.bincount(members, minlength=len(datasets)).tolist()):
            if wanted > len(datasets[number]):
                raise DataError(
                    f"member {number} of the mixture has {len(datasets[number])} samples, {wanted} are wanted of it",
                    fix="build its map for more samples, or lower its weight",
                )

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.datasets[int(self._members[index])][int(self._ranks[index])]


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

    FORMAT: the formula of earlier runs with `weight_by_num_documents`; small members are raised even at alpha 1.
    One member alone has weight 1.

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
