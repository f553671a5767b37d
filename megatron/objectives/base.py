# SPDX-License-Identifier: Apache-2.0
"""What an objective is: which data it wants, how samples become a batch, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from megatron.data.batch import Batch

if TYPE_CHECKING:
    from megatron.model.head import Logits

Sample = Mapping[str, np.ndarray]
"""One item of a dataset: stream name -> array, e.g. {"text": int64 [s+1], "label": int64 [s+1]}."""


class LossTerms(NamedTuple):
    """What one micro batch contributes.

    loss    scalar, already divided by the step's global denominator
    metrics name -> scalar tensor, summed over micro batches and data ranks to give the step's value
            (so each is divided by the global denominator, too)
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class Objective(Protocol):
    """One training goal. A new one is one file."""

    streams: tuple[str, ...]
    """Aligned dataset streams wanted: ("text",), ("text", "label"), ("pos", "neg", ...)."""

    needs_reference: bool
    """Whether `extras` must carry log-probs of a frozen reference model."""

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Samples of one micro batch -> Batch on the CPU."""

    def denominator(self, batch: Batch) -> float:
        """What this batch adds to the step's global denominator: trained tokens, sequences or pairs."""

    def loss(self, logits: Logits, targets: Mapping[str, Tensor], denominator: Tensor) -> LossTerms:
        """Loss of one micro batch.

        logits:      handle of the head (never the full matrix)
        targets:     {"labels", "loss_weight", "segment_ids", **extras}, on the model's device
        denominator: scalar float32, summed over all micro batches of the step and all data ranks
        """
