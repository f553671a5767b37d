# SPDX-License-Identifier: Apache-2.0
"""torch.nn.attention.varlen: attention over documents of any length on CUDA, without a mask. Knows no other back end."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.model.attention.inputs import AttentionInputs
from megatron.model.spec import AttentionSpec


def refuses(spec: AttentionSpec, dtype: torch.dtype) -> str | None:
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


def attend(q: Tensor, k: Tensor, v: Tensor, view: AttentionInputs) -> Tensor:
    """q [b, s, n, d], k and v [b, t, g, d] -> [b, s, n, d]."""
    from torch.nn.attention.varlen import varlen_attn

    (b, s), t = q.shape[:2], k.shape[1]
    if view.documents is None:
        starts_q = boundaries(b, s, q.device)
        starts_k, longest_q, longest_k = (starts_q, s, s) if s == t else (boundaries(b, t, q.device), s, t)
    else:
        starts_q = starts_k = view.documents.cu_seqlens
        longest_q = longest_k = view.documents.longest
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
