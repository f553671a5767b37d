# SPDX-License-Identifier: Apache-2.0
"""A micro batch of token rows, ready for a model, and the further tensors that an objective adds to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from megatron.errors import TrainingError

S = TypeVar("S")


class ExtraLayout(str, Enum):
    """What the first dimensions of an extra count, which decides how it is cut with a batch along the sequence."""

    TOKEN = "token"  # [b, s, ...] one entry per token: cut with the tokens
    ROW = "row"  # [b] one value per row
    DOCUMENT = "document"  # [n] one value per document of the batch, numbered by `document_index`


class Extra(NamedTuple):
    """A further input of an objective's loss, with its layout."""

    values: Tensor
    layout: ExtraLayout


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro batch.

    tokens      [b, s] int64   model input
    labels      [b, s] int64   next token, already shifted; where loss_weight is 0 any valid id
    loss_weight [b, s] float32 0 = not trained; negative = gradient ascent
    segment_ids [b, s] int32   document number in the row (all 0 = joined); always of whole rows, also where the others are cut
    extras      name -> further input of the objective (reference log-probs, rewards, ...)
    samples     how many samples of the data set the rows are made of; None = one per row. A pair is one sample in two rows.
    padding     how many of the tokens are padding

    Raises TrainingError for an extra that has no layout or does not fit it.

    >>> rows = torch.zeros(1, 4, dtype=torch.int64)
    >>> extras = {"rewards": Extra(torch.ones(2), ExtraLayout.DOCUMENT)}
    >>> segment_ids = torch.tensor([[0, 0, 1, 1]])
    >>> Batch(tokens=rows, labels=rows, loss_weight=rows.float(), segment_ids=segment_ids, extras=extras).num_documents
    2
    """

    tokens: Tensor
    labels: Tensor
    loss_weight: Tensor
    segment_ids: Tensor
    extras: Mapping[str, Extra] = field(default_factory=dict)
    samples: int | None = None
    padding: int = 0

    def __post_init__(self) -> None:
        for name, extra in self.extras.items():
            self._require_fit(name, extra)

    @cached_property
    def num_documents(self) -> int:
        """Documents of all rows: runs of equal segment ids."""
        return int(document_index(self.segment_ids)[-1, -1]) + 1 if self.segment_ids.numel() else 0

    @property
    def num_samples(self) -> int:
        """Samples of the data set that the batch is made of."""
        return int(self.tokens.shape[0]) if self.samples is None else self.samples

    def _require_fit(self, name: str, extra: Extra) -> None:
        if not isinstance(extra, Extra):
            raise TrainingError(
                f"the extra {name!r} of a batch does not say its layout",
                where="Batch.extras",
                fix="give an Extra(values, ExtraLayout.TOKEN | ROW | DOCUMENT)",
            )
        rows, length = self.tokens.shape
        wanted: dict[ExtraLayout, tuple[int, ...]] = {ExtraLayout.TOKEN: (rows, length), ExtraLayout.ROW: (rows,)}
        shape = wanted.get(extra.layout) or (self.num_documents,)
        found = tuple(extra.values.shape)
        if (found[:2] if extra.layout is ExtraLayout.TOKEN else found) != shape:
            raise TrainingError(
                f"the extra {name!r} has the layout {extra.layout.value!r} and must be {list(shape)}, got {list(found)}",
                where="Batch.extras",
                fix="give one entry per token [b, s, ...], row [b] or document [n], and declare which",
            )


def document_index(segment_ids: Tensor) -> Tensor:
    """Number of each token's document within the batch. [b, s] int32 -> [b, s] int64

    A document is a run of equal segment ids in one row; documents are counted row by row.

    >>> document_index(torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1]]))
    tensor([[0, 0, 1, 2],
            [3, 4, 4, 4]])
    """
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return starts.flatten().cumsum(0).view(segment_ids.shape) - 1


def counting_samples(collate: Callable[[Sequence[S]], Batch]) -> Callable[[Sequence[S]], Batch]:
    """The same collate; its batches say how many samples they were made of."""
    return lambda samples: replace(collate(samples), samples=len(samples))
