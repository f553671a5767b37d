# SPDX-License-Identifier: Apache-2.0
"""What an objective's loss is told of the step around it, and the sums that are right however ranks share the batch.

Under context parallelism a rank has a part of every row, [b, s / cp]. All sums here run over the whole rows: their value is the same
on every rank, and their gradient reaches this rank's part. Adding up the ranks' gradients, as data parallelism does, gives the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.data.batch import Extra, document_index
from megatron.errors import TrainingError
from megatron.mpu import comm
from megatron.mpu.context import ContextPlan

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
