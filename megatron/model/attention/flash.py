# SPDX-License-Identifier: Apache-2.0
"""The flash-attn package (Dao, arXiv 2307.08691): rows and packed documents on CUDA. Knows no other back end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.model.attention.inputs import AttentionInputs
from megatron.model.spec import AttentionSpec
from megatron.mpu.random import seeded


def refuses(spec: AttentionSpec, dtype: torch.dtype) -> str | None:
    """Why this kernel cannot serve a spec."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn computes in float16 or bfloat16, not {dtype}"
    if spec.rpe is not None:
        return "flash-attn has no learned bias on the scores (rpe)"
    if spec.head_dim > 256:
        return f"flash-attn takes head sizes up to 256, not {spec.head_dim}"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, view: AttentionInputs) -> Tensor:
    """q [b, s, n, d], k and v [b, t, g, d] -> [b, s, n, d]."""
    if view.dropout > 0.0:
        with seeded(view.seeds[0], q.device):  # the kernel draws by itself, and ranks of a tensor group must not draw alike
            return _attend(q, k, v, view)
    return _attend(q, k, v, view)


def _attend(q: Tensor, k: Tensor, v: Tensor, view: AttentionInputs) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    behind = -1 if view.window is None else view.window
    common: dict[str, Any] = {
        "dropout_p": view.dropout,
        "softmax_scale": view.scale,
        "causal": True,
        "window_size": (behind, 0 if view.window is not None else -1),
        "alibi_slopes": view.slopes,
    }
    if view.documents is None:
        rows: Tensor = flash_attn_func(q, k, v, **common)
        return rows
    starts, longest = view.documents.cu_seqlens, view.documents.longest
    flat: Tensor = flash_attn_varlen_func(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), starts, starts, longest, longest, **common)
    return flat.view(q.shape)
