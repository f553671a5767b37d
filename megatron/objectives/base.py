# SPDX-License-Identifier: Apache-2.0
"""What an objective is: which data it wants, how samples become a batch, and the loss of a batch within its step.

Under context parallelism a rank has a part of every row, [b, s / cp]. The sums of `LossContext` run over the whole rows: their value is
the same on every rank, and their gradient reaches this rank's part. Adding up the ranks' gradients, as data parallelism does, gives the
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from megatron.data.batch import Batch, Extra, document_index
from megatron.errors import TrainingError
from megatron.mpu import comm
from megatron.mpu.context import ContextPlan

if TYPE_CHECKING:
    from megatron.model.head import Logits
    from megatron.neox_arguments import NeoXArgs

REFERENCE = "reference_logps"
"""Name of the extra with the log-probs of a frozen reference."""


@dataclass(frozen=True, kw_only=True)
class LossContext:
    """Of one micro batch within its step.

    segment_ids:   [b, s] int32, of whole rows
    num_documents: documents of the micro batch
    denominators:  name -> scalar float32, summed over the step's micro batches and data ranks, and 1 where nothing was counted
    extras:        the micro batch's, on the model's device, cut like its tokens
    plan:          how sequences are cut over ranks
    """

    segment_ids: Tensor
    num_documents: int
    denominators: Mapping[str, Tensor]
    extras: Mapping[str, Extra] = field(default_factory=dict)
    plan: ContextPlan = field(default_factory=ContextPlan)

    def denominator(self, name: str = "tokens") -> Tensor:
        """What the loss of the whole step is divided by. Raises TrainingError for a name that the objective does not count."""
        found = self.denominators.get(name)
        if found is None:
            raise TrainingError(
                f"the objective has no denominator {name!r}, only {', '.join(sorted(self.denominators)) or 'none'}",
                where="Objective.denominators",
                fix="count it there",
            )
        return found

    def sum_tokens(self, x: Tensor) -> Tensor:
        """Sum over all tokens of the micro batch. [b, s / cp] -> []"""
        return self.sum_ranks(x.sum())

    def sum_documents(self, x: Tensor) -> Tensor:
        """Sum over the tokens of each document. [b, s / cp] -> [n], in the order of `document_index`"""
        index = self.plan.own(document_index(self.segment_ids)).flatten()
        return self.sum_ranks(x.new_zeros(self.num_documents).index_add(0, index, x.flatten()))

    def sum_ranks(self, x: Tensor) -> Tensor:
        """Sum of what the ranks made of their parts of the rows; any shape."""
        return comm.reduce(x, self.plan.group)

    def gather_tokens(self, x: Tensor) -> Tensor:
        """Whole rows from their parts, without gradient. [b, s / cp, ...] -> [b, s, ...]"""
        if self.plan.size == 1:
            return x.detach()
        parts = comm.all_gather(x.detach(), self.plan.group, 1)
        length = parts.shape[1]
        order = torch.cat([self.plan.rows(length, x.device, rank) for rank in range(self.plan.size)])
        return parts.index_select(1, order.argsort())

    def reference(self) -> Tensor:
        """Log-probs of the frozen reference in the layout in which they were added: [n] or [b, s / cp].

        Raises TrainingError where the batch has none.
        """
        if REFERENCE not in self.extras:
            raise TrainingError(
                "the batch has no log-probs of the reference",
                where=f"Batch.extras[{REFERENCE!r}]",
                fix="add them in the objective's `prepare`, from a cache or a scoring pass",
            )
        return self.extras[REFERENCE].values


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
