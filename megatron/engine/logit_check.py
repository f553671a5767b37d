# SPDX-License-Identifier: Apache-2.0
"""The logits of a fixed input: kept in a checkpoint when it is written, compared when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.data.batch import Batch
from megatron.engine.base import Engine
from megatron.errors import CheckpointError
from megatron.log import get_logger

log = get_logger(__name__)

STORED = "checkpoint_validation_logits"
"""FORMAT: key of the logits in a checkpoint's client state."""

LENGTH = 16
"""Tokens of the fixed input: enough to meet every layer, few enough to keep all their logits."""

TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2
"""Largest allowed difference, as a share of the largest logit, in float32 and where one side is in half precision: other kernels
and other layouts stay below."""


def forward_pass(engine: Engine, *, vocab_size: int, seq_length: int) -> Tensor:
    """Logits [1, min(16, seq_length), v] of the fixed input. All ranks call it."""
    length = min(LENGTH, seq_length)
    tokens = ((torch.arange(length) * 7919 + 13) % vocab_size).unsqueeze(0)
    nothing = torch.zeros(1, length)
    batch = Batch(tokens=tokens, labels=tokens, loss_weight=nothing, segment_ids=nothing.int())
    (logits,) = engine.score([batch], lambda logits, targets, context: context.gather_tokens(logits.full()))
    return logits


def compare_forward(stored: Mapping[str, Any], now: Tensor, folder: Path) -> None:
    """Raise CheckpointError when the logits stored in a checkpoint's bookkeeping are not those of the model that was read from it."""
    before = stored.get(STORED)
    if before is None:
        log.warning("%s holds no logits of a fixed input, so there is nothing to compare the model with", folder)
        return
    if before.shape != now.shape:
        raise CheckpointError(f"logits of the fixed input: {list(before.shape)} stored, {list(now.shape)} now", where=str(folder), fix=_FIX)
    exact = before.dtype == now.dtype == torch.float32
    difference = float((before.float() - now.float()).abs().max())
    largest = float(before.float().abs().max())
    # Written so that NaN is refused, too.
    if not difference <= (TOLERANCE if exact else HALF_TOLERANCE) * largest:
        raise CheckpointError(
            f"the model read from the checkpoint is not the one that was saved: its logits differ by up to {difference:.3g} "
            f"(largest logit {largest:.3g})",
            where=str(folder),
            fix=_FIX,
        )
    log.info("the forward pass of a fixed input gives the logits of the checkpoint (largest difference %.3g)", difference)


_FIX = "use the configuration the checkpoint was trained with; `checkpoint_validation_with_forward_pass: false` skips this check"
