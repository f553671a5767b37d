# SPDX-License-Identifier: Apache-2.0
"""The ways to compute attention (eager, SDPA, varlen, flash-attn), and the choice among them.

All give the same result; each says what it refuses.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.errors import BackendError
from megatron.fused_kernels.available import available
from megatron.model.attention.inputs import AttentionInputs, needs_no_mask
from megatron.model.spec import AttentionSpec, BackendName
from megatron.mpu.random import drop_by_head, seeded


class Attend(Protocol):
    """q [b, s, n, d], k and v [b, t, g, d] (t > s with a cache) -> [b, s, n, d]. Vaswani et al., arXiv 1706.03762, eq. 1."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, view: AttentionInputs) -> Tensor: ...


def eager(q: Tensor, k: Tensor, v: Tensor, view: AttentionInputs) -> Tensor:
    """The reference: scores, mask, softmax, product. Shapes as in `Attend`."""
    s, t, repeat = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
    scores = torch.einsum("bsnd,btnd->bnst", q * (view.scale / view.divisor), k)
    if view.fp32 or view.divisor != 1.0:
        scores = scores.float() * view.divisor
    bias = view.added(s, t)
    if bias is not None:
        scores = scores + bias
    see = view.visible(s, t, q.device)
    probs = scores.masked_fill(~see, float("-inf")).softmax(dim=-1).to(q.dtype)
    if view.dropout > 0.0:
        probs = drop_by_head(probs, view.dropout, view.seeds)
    return torch.einsum("bnst,btnd->bsnd", probs, v)


def sdpa(q: Tensor, k: Tensor, v: Tensor, view: AttentionInputs) -> Tensor:
    """torch's scaled_dot_product_attention. Packed documents are computed one by one, in a compiled graph with a mask."""
    with _own_draws(view, q.device):
        return _sdpa_documents(q, k, v, view)


def _own_draws(view: AttentionInputs, device: torch.device) -> AbstractContextManager[None]:
    """Around a kernel that draws by itself, one stream for all heads: ranks of a tensor group must not draw alike."""
    return seeded(view.seeds[0], device) if view.dropout > 0.0 else nullcontext()


def _sdpa_documents(q: Tensor, k: Tensor, v: Tensor, view: AttentionInputs) -> Tensor:
    # A graph must not depend on the documents' lengths: it would be compiled again for every batch.
    if view.documents is None or torch.compiler.is_compiling():
        return _sdpa_rows(q, k, v, view)
    # A document never meets its neighbours, so nothing of them can reach it; and there is no mask of s * s.
    lengths = view.documents.lengths()
    view = replace(view, documents=None)
    queries, keys, values = (x.flatten(0, 1)[None].split(lengths, dim=1) for x in (q, k, v))
    out = torch.cat([_sdpa_rows(*piece, view) for piece in zip(queries, keys, values, strict=True)], dim=1)
    return out.view(q.shape)


def _sdpa_rows(q: Tensor, k: Tensor, v: Tensor, view: AttentionInputs) -> Tensor:
    """Whole rows."""
    s = q.shape[1]
    differ = view.documents is not None or view.offsets is not None
    if s == 1 and not differ and view.window is not None and k.shape[1] > view.window + 1:
        k, v = k[:, -view.window - 1 :], v[:, -view.window - 1 :]
    t = k.shape[1]
    mask: Tensor | None = None
    causal = view.bias is None and not differ and s > 1 and needs_no_mask(s, t, view.window)
    if not causal and (s > 1 or differ or view.bias is not None):
        mask, bias = view.visible(s, t, q.device), view.added(s, t)
        if bias is not None:
            mask = bias.to(q.dtype).masked_fill(~mask, float("-inf"))
            mask = mask if mask.dim() == 4 else mask[None]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=view.dropout,
        is_causal=causal,
        scale=view.scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def refuses(name: BackendName, spec: AttentionSpec, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a back end cannot compute this attention here; None when it can."""
    if name in (BackendName.AUTO, BackendName.EAGER, BackendName.SDPA):
        return None
    if device.type != "cuda":
        return f"{name.value} runs on CUDA, not on {device.type}"
    if name is BackendName.VARLEN:
        return available("varlen") or varlen_refuses(spec, dtype)
    return available("flash_attn") or flash_refuses(spec, dtype)


def pick(spec: AttentionSpec, device: torch.device, dtype: torch.dtype, *, dropout: bool = False, uneven: bool = False) -> Attend:
    """The back end of a spec on a device. A named one is that one or an error; `auto` is always found.

    dropout: attention weights will be dropped. The same ones at any tensor parallel size by EAGER, which `auto` then takes on a CPU,
             where SDPA has no fused kernel for it either; fused kernels draw a stream of their own on each rank.

    uneven: rows have cached different numbers of tokens, which takes a mask, so SDPA serves where a CUDA kernel would

    Raises BackendError with the reason a named back end is refused.
    """
    name = spec.backend
    if name is BackendName.AUTO:
        # SDPA has no fast kernel for documents and windows; varlen has.
        gains = device.type == "cuda" and (spec.isolated or spec.window is not None)
        wanted = [BackendName.FLASH_ATTN] * spec.flash + [BackendName.VARLEN] * gains
        fallback = BackendName.EAGER if dropout and device.type == "cpu" else BackendName.SDPA
        name = next((other for other in wanted if refuses(other, spec, device, dtype) is None), fallback)
    reason = refuses(name, spec, device, dtype)
    if reason is not None:
        raise BackendError(
            f"attention_backend {name.value} was asked for, but {reason}", where="attention_backend", fix="use attention_backend: auto"
        )
    table: dict[BackendName, Attend] = {
        BackendName.EAGER: eager,
        BackendName.SDPA: sdpa,
        BackendName.VARLEN: varlen,
        BackendName.FLASH_ATTN: flash,
    }
    return sdpa if uneven and name is not BackendName.EAGER else table[name]


# ---- fused attention on CUDA: torch.nn.attention.varlen, and the flash-attn package (arXiv 2307.08691) -------------


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
    with _own_draws(view, q.device):
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
