# SPDX-License-Identifier: Apache-2.0
"""Fused attention on CUDA over rows and packed documents: torch.nn.attention.varlen, and the flash-attn package (arXiv 2307.08691)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.model.attention.inputs import AttentionInputs
from megatron.model.spec import AttentionSpec
from megatron.mpu.random import seeded


def varlen_refuses(spec: AttentionSpec, dtype: torch.dtype) -> str | None:
    """Why this kernel cannot serve a spec."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"varlen computes in float16 or bfloat16, not {dtype}"
    if spec.rpe is not None or spec.alibi:
        return "varlen has no bias on the scores (rpe, alibi)"
    if spec.dropout > 0.0:
        return "varlen has no attention dropout"
    if spec.head_dim > 256 or spec.head_dim % 8:
        return f"varlen takes head sizes up to 256 that are multiples of 8, not {spec.head_dim}"
    return None


def boundaries(rows: int, length: int, device: torch.device) -> Tensor:
    """Where each of `rows` rows of equal `length` begins in the flattened batch, and its end; int32 [rows + 1]."""
    return torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device)


def varlen(q: Tensor, k: Tensor, v: Tensor, view: AttentionInputs) -> Tensor:
    """q [b, s, n, d], k and v [b, t, g, d] -> [b, s, n, d]."""
    from torch.nn.attention.varlen import varlen_attn

    (b, s), t = q.shape[:2], k.shape[1]
    if view.documents is None:
        starts_q = boundaries(b, s, q.device)
        starts_k, longest_q, longest_k = (starts_q, s, s) if s == t else (boundaries(b, t, q.device), s, t)
    else:
        starts_q = starts_k = view.documents.cu_seqlens
        longest_q = longest_k = view.documents.max_seqlen
    behind = -1 if view.window is None else view.window
    out = varlen_attn(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        starts_q,
        starts_k,
        longest_q,
        longest_k,
        scale=view.scale,
        window_size=(behind, 0),  # aligned with the last key, so right with a cache as well
        enable_gqa=q.shape[2] != k.shape[2],
    )
    assert isinstance(out, Tensor)
    return out.view(q.shape)


def flash_refuses(spec: AttentionSpec, dtype: torch.dtype) -> str | None:
    """Why this kernel cannot serve a spec."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn computes in float16 or bfloat16, not {dtype}"
    if spec.rpe is not None:
        return "flash-attn has no learned bias on the scores (rpe)"
    if spec.head_dim > 256:
        return f"flash-attn takes head sizes up to 256, not {spec.head_dim}"
    return None


def flash(q: Tensor, k: Tensor, v: Tensor, view: AttentionInputs) -> Tensor:
    """q [b, s, n, d], k and v [b, t, g, d] -> [b, s, n, d]."""
    if view.dropout > 0.0:
        with seeded(view.seeds[0], q.device):  # the kernel draws by itself, and ranks of a tensor group must not draw alike
            return _flash(q, k, v, view)
    return _flash(q, k, v, view)


def _flash(q: Tensor, k: Tensor, v: Tensor, view: AttentionInputs) -> Tensor:
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
    starts, longest = view.documents.cu_seqlens, view.documents.max_seqlen
    flat: Tensor = flash_attn_varlen_func(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), starts, starts, longest, longest, **common)
    return flat.view(q.shape)
