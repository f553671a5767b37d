# SPDX-License-Identifier: Apache-2.0
"""What is absent is absent for a reason that is told."""

from __future__ import annotations

import pytest
import torch

from megatron.errors import BackendError
from megatron.fused_kernels.available import available


def test_reasons() -> None:
    for name in ("flash_attn", "varlen", "transformer_engine", "apex"):
        reason = available(name)
        if not torch.cuda.is_available():
            assert reason is not None and "CUDA" in reason
    with pytest.raises(BackendError, match="no optional kernel"):
        available("warp_drive")
