# SPDX-License-Identifier: Apache-2.0
"""The logits of a fixed input: kept in a checkpoint when it is written, compared when it is read. Knows no file format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.data.batch import Batch
from megatron.engine.base import Engine
from megatron.errors import CheckpointError, TrainingError
from megatron.log import get_logger
from megatron.model.head import Logits
from megatron.mpu.collectives import of_all_ranks, of_last_rank
from megatron.mpu.context import ContextPlan
from megatron.objectives.base import LossTerms, Sample

log = get_logger(__name__)

STORED = "checkpoint_validation_logits"
"""FORMAT: key of the logits in a checkpoint's client state."""

LENGTH = 16
"""Tokens of the fixed input: enough to meet every layer, few enough to keep all their logits."""

TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2
"""Largest allowed difference, as a share of the largest logit, in float32 and where one side is in half precision: other kernels
and other layouts stay below."""


class LogitsProbe:
    """An objective that trains nothing and keeps the logits it is shown."""

    streams: tuple[str, ...] = ()
    needs_reference = False

    def __init__(self) -> None:
        self.logits: Tensor | None = None

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """There is no data."""
        raise TrainingError("the forward check has a fixed input and no data", fix="call forward_pass")

    def denominator(self, batch: Batch) -> float:
        """No token counts."""
        return 0.0

    def loss(self, logits: Logits, targets: Mapping[str, Tensor], denominator: Tensor) -> LossTerms:
        """Keep the logits [b, s, v] on the host."""
        self.logits = logits.full().detach().cpu()
        return LossTerms(torch.zeros((), device=denominator.device), {})


def forward_pass(engine: Engine, *, vocab_size: int, seq_length: int) -> Tensor:
    """Logits [1, min(16, seq_length), v] of the fixed input. All ranks call it."""
    length = min(LENGTH, seq_length)
    tokens = ((torch.arange(length) * 7919 + 13) % vocab_size).unsqueeze(0)
    nothing = torch.zeros(1, length)
    probe = LogitsProbe()
    engine.eval_step(probe, [Batch(tokens=tokens, labels=tokens, loss_weight=nothing, segment_ids=nothing.int())])
    logits = of_last_rank(probe.logits, engine.groups.pp)
    if logits is None:
        raise CheckpointError("the engine showed no logits of the fixed input", where="checkpoint_validation_with_forward_pass")
    return in_order(logits, engine.context)


def in_order(own: Tensor, context: ContextPlan) -> Tensor:
    """Every context rank's rows [1, s / cp, v] -> all of them [1, s, v], in the order of the sequence."""
    if context.size == 1:
        return own
    parts = of_all_ranks(own, context.group)
    length = own.shape[1] * context.size
    places = torch.cat([context.rows(length, rank=rank) for rank in range(context.size)])
    return torch.cat(parts, dim=1)[:, places.argsort()]


def compare_forward(stored: Mapping[str, Any], now: Tensor, folder: Path) -> None:
    """Raise CheckpointError when the logits stored in a checkpoint's bookkeeping are not those of the model that was read from it."""
    before = stored.get(STORED)
    if before is None:
        log.warning("%s holds no logits of a fixed input, so there is nothing to compare the model with", folder)
        return
    if before.shape != now.shape:
        raise CheckpointError(
            f"logits of the fixed input: {list(before.shape)} stored, {list(now.shape)} now", where=str(folder), fix=_MEND
        )
    exact = before.dtype == now.dtype == torch.float32
    difference = float((before.float() - now.float()).abs().max())
    largest = float(before.float().abs().max())
    # Written so that NaN is refused, too.
    if not difference <= (TOLERANCE if exact else HALF_TOLERANCE) * largest:
        raise CheckpointError(
            f"the model read from the checkpoint is not the one that was saved: its logits differ by up to {difference:.3g} "
            f"(largest logit {largest:.3g})",
            where=str(folder),
            fix=_MEND,
        )
    log.info("the forward pass of a fixed input gives the logits of the checkpoint (largest difference %.3g)", difference)


_MEND = "use the configuration the checkpoint was trained with; `checkpoint_validation_with_forward_pass: false` skips this check"
