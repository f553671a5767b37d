# SPDX-License-Identifier: Apache-2.0
"""What an objective is: which data it wants, how samples become a batch, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import numpy as np
from torch import Tensor

from megatron.data.batch import Batch
from megatron.objectives.context import LossContext

if TYPE_CHECKING:
    from megatron.model.head import Logits
    from megatron.neox_arguments import NeoXArgs

Sample = Mapping[str, np.ndarray]
"""One item of a dataset: stream name -> array, e.g. {"text": int64 [s+1], "label": int64 [s+1]}."""

Targets = Mapping[str, Tensor]
"""{"labels", "loss_weight", "segment_ids", **extras} of one micro batch, on the model's device."""

T = TypeVar("T")
ReadAny = Callable[["Logits", Targets, LossContext], T]
Read = ReadAny[Tensor]
"""What is read from the logits of one micro batch: a tensor that is the same on all ranks that share the batch."""


class Metric(NamedTuple):
    """One number to report.

    value:   scalar, of one whole micro batch, not divided by anything
    over:    name of the denominator that the sum over the step is divided by; None = it is not divided
    maximum: the largest value of the step, instead of the sum
    """

    value: Tensor
    over: str | None = "tokens"
    maximum: bool = False


class LossTerms(NamedTuple):
    """What one micro batch contributes.

    loss    scalar: the micro batch's part of the step's loss, already divided by denominators of the whole step. The same on all
            ranks that share the micro batch, so it is made of what the context's sums give.
    metrics name -> Metric
    """

    loss: Tensor
    metrics: Mapping[str, Metric]


class Scorer(Protocol):
    """A model that can be asked without being trained: the engine itself, or a frozen reference."""

    def score(self, batches: Iterable[Batch], read: Read) -> list[Tensor]:
        """What `read` gives for each batch, on the CPU of every rank that has the batch. All ranks call it."""

    def sum_over_data(self, values: Tensor) -> Tensor:
        """Sum over the data ranks. All ranks call it."""


class Objective(Protocol):
    """One training goal. A new one is one file with a class that derives from this one, and its name in the registry."""

    streams: tuple[str, ...]
    """Aligned dataset streams wanted: ("text",), ("text", "label"), ("pos", "neg", ...)."""

    @classmethod
    def from_args(cls, args: NeoXArgs, *, eod: int) -> Objective:
        """The objective as the configuration asks for it. eod: the tokenizer's end-of-document id"""

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Samples of one micro batch -> Batch on the CPU."""

    def denominators(self, batch: Batch) -> Mapping[str, float]:
        """What this batch adds to each of the step's denominators, by name: "tokens", "documents", "pairs", ...

        The names are the same for every batch. Counted on whole rows, before a batch is cut along the sequence.
        """

    def prepare(self, micro_batches: Sequence[Batch], scorer: Scorer) -> Sequence[Batch]:
        """The micro batches of this rank's step with what must be known before it: extras from a scoring pass or a cache.

        Called on all ranks before every step, and in evaluation before every micro batch.
        scorer: the model as it is before the step
        """
        return micro_batches

    def loss(self, logits: Logits, targets: Targets, context: LossContext) -> LossTerms:
        """Loss of one micro batch. logits: handle of the head, of this rank's part of the sequence"""
